"""Greedy InfoMax's modules, context network and loss, reproduced from its weights."""

import pytest
import torch

from cpc_ext.models import GatedPixelCNNContext, GreedyInfoMax, ResNetV2Encoder
from cpc_ext.nn import GridInfoNCE

# The program takes log(p + 1e-11), which moves its loss and gradients this far from an exact log-softmax.
LOG_EPSILON_TOLERANCE = {"atol": 1e-7, "rtol": 0}
EXACT = {"atol": 1e-10, "rtol": 0}


def test_pixelcnn(golden, context_state):
    problem = golden("greedy_infomax.pixelcnn")
    context = GatedPixelCNNContext(problem.config["in_channels"], problem.config["layers"]).double()
    context.load_state_dict(context_state(problem.state()))
    encodings = problem.tensors["z"].requires_grad_()

    contexts = context(encodings)
    contexts.backward(problem.tensors["grad_y"])

    torch.testing.assert_close(contexts, problem.tensors["y"], **EXACT)
    torch.testing.assert_close(encodings.grad, problem.tensors["grad_z"], **EXACT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, LOG_EPSILON_TOLERANCE), (torch.float32, {"atol": 1e-5, "rtol": 1e-5})]
)
def test_info_nce(golden, dtype, tolerance):
    problem = golden("greedy_infomax.info_nce")
    config, tensors = problem.config, problem.tensors
    steps, samples = config["pred_steps"], config["neg_samples"]
    objective = GridInfoNCE(config["in_channels"], pred_steps=steps, skip=config["skip_step"], neg_samples=samples).to(
        dtype
    )
    matrices = [tensors[f"state.W_k.{step}.weight"][:, :, 0, 0] for step in range(steps)]
    objective.load_state_dict({"weight": torch.stack(matrices).unsqueeze(0)})
    encodings, contexts = (tensors[name].to(dtype).requires_grad_() for name in "zc")

    output = objective(
        encodings.unsqueeze(0),
        contexts.unsqueeze(0),
        negatives=[tensors[f"negatives.{step}"].view(-1, samples) for step in range(steps)],
    )
    output.loss.backward()

    expected = {name: value.to(dtype) for name, value in tensors.items() if value.is_floating_point()}
    torch.testing.assert_close(output.loss, expected["loss"], **tolerance)
    torch.testing.assert_close(encodings.grad, expected["grad_z"], **tolerance)
    torch.testing.assert_close(contexts.grad, expected["grad_c"], **tolerance)
    for step in range(steps):
        torch.testing.assert_close(objective.weight.grad[0, step], expected[f"grad_W.{step}"][:, :, 0, 0], **tolerance)


def encoder_name(module, name):
    """A module's parameter name in the program → that of the whole encoder here."""
    stack = "model.layer 0."
    if name.startswith(stack):
        return f"layers.{module}." + name.removeprefix(stack).replace("shortcut.0.", "shortcut.")
    return name.replace("model.Conv1", "conv1")


@pytest.fixture
def modules(golden):
    """The problem and the model with its weights, in a dtype."""

    def load(dtype):
        problem = golden("greedy_infomax.modules")
        config, tensors = problem.config, problem.tensors
        encoder = ResNetV2Encoder(
            in_channels=1,
            blocks=config["blocks"],
            channels=config["channels"],
            stem_channels=config["channels"][0],
            patch_size=config["patch"],
            stride=config["patch"] // config["overlap"],
        )
        model = GreedyInfoMax(encoder, 3, pred_steps=config["prediction_step"], neg_samples=config["negative_samples"])
        model = model.to(dtype)
        state = {}
        for module in range(3):
            own = problem.state(f"state.{module}.")
            state |= {
                f"encoder.{encoder_name(module, name)}": value for name, value in own.items() if "W_k" not in name
            }
            matrices = [own[f"loss.W_k.{step}.weight"][:, :, 0, 0] for step in range(config["prediction_step"])]
            state[f"objectives.{module}.weight"] = torch.stack(matrices).unsqueeze(0)
        model.load_state_dict(state)
        negatives = [
            [
                tensors[f"negatives.{module}.{step}"].view(-1, config["negative_samples"])
                for step in range(config["prediction_step"])
            ]
            for module in range(3)
        ]
        return model, tensors["x"].to(dtype), negatives, tensors

    return load


def test_module_outputs(modules):
    model, images, _, expected = modules(torch.float64)
    for module, encodings in enumerate(model.encodings_by_module(images)):
        torch.testing.assert_close(encodings, expected[f"out.{module}"], **EXACT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, LOG_EPSILON_TOLERANCE), (torch.float32, {"atol": 1e-5, "rtol": 1e-5})]
)
def test_module_losses(modules, dtype, tolerance):
    model, images, negatives, expected = modules(dtype)

    for module, output in enumerate(model.outputs(images, negatives=negatives)):
        output.loss.backward()
        torch.testing.assert_close(output.loss, expected[f"loss.{module}"].to(dtype), **tolerance)

    # Only the first module's loss reaches the first module.
    gradient = expected["grad.0.model.Conv1.weight"].to(dtype)
    torch.testing.assert_close(model.encoder.conv1.weight.grad, gradient, **tolerance)
