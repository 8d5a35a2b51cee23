"""CPCV2-PyTorch's encoders and its whole model, reproduced from its weights."""

import re

import pytest
import torch

from cpc_ext.models import CPC, GatedPixelCNNContext, ResNetV2Encoder, WideResNetEncoder

STEMS = {"stl10": "stl10", "cifar10": "cifar", "imagenet": "imagenet"}


def make_encoder(config, state):
    encoder = ResNetV2Encoder(
        in_channels=1 if config.get("gray") else 3,
        blocks=config["num_blocks"],
        bottleneck=config["block"] == "PreActBottleneck",
        channels=config["num_channels"],
        norm=config["norm"],
        stem=STEMS[config["stem"]],
    ).double()
    encoder.load_state_dict(
        {k.replace("shortcut.0.", "shortcut."): v for k, v in state.items() if not k.startswith("classifier.")}
    )
    return encoder


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_resnet(golden, norm):
    problem = golden(f"cpcv2_pytorch.resnet_{norm}")
    encoder = make_encoder(problem.config, problem.state()).eval()

    encodings = encoder(problem.tensors["x"])

    torch.testing.assert_close(encodings.permute(0, 2, 3, 1), problem.tensors["y"], atol=1e-10, rtol=0)


def test_wide_resnet(golden):
    problem = golden("cpcv2_pytorch.wide_resnet")
    config = problem.config
    encoder = WideResNetEncoder(config["depth"], config["widen_factor"], norm=config["norm"]).double()
    state = {
        re.sub(r"^layer(\d)", lambda stack: f"layers.{int(stack[1]) - 1}", name): value
        for name, value in problem.state().items()
        if not name.startswith("classifier.")
    }
    encoder.load_state_dict({name.replace("shortcut.0.", "shortcut."): value for name, value in state.items()})

    encodings = encoder(problem.tensors["x"])

    torch.testing.assert_close(encodings.permute(0, 2, 3, 1), problem.tensors["y"], atol=1e-10, rtol=0)


# The program takes log(p + 1e-11), so an exact log-softmax agrees with it to about 1e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("directions", [1, 4])
def test_cpc(golden, context_state, directions, dtype, tolerance):
    problem = golden(f"cpcv2_pytorch.cpc_{directions}dir")
    config, tensors = problem.config, problem.tensors
    steps, samples = config["pred_steps"], config["neg_samples"]
    encoder = make_encoder(config, problem.state("state.enc."))
    context = GatedPixelCNNContext(encoder.out_channels).to(dtype)
    context.load_state_dict(context_state(problem.state("state.ar.")))
    model = CPC(encoder, context, pred_steps=steps, pred_directions=directions, neg_samples=samples).to(dtype)
    matrices = [
        tensors[f"state.pred_loss.{direction}.W_k.{step}.weight"][:, :, 0, 0]
        for direction in range(directions)
        for step in range(steps)
    ]
    model.objective.load_state_dict({"weight": torch.stack(matrices).unflatten(0, (directions, steps))})

    output = model(
        tensors["x"].to(dtype),
        negatives=[tensors[f"negatives.{n}"].view(-1, samples) for n in range(directions * steps)],
    )
    output.loss.backward()

    torch.testing.assert_close(output.loss, tensors["loss"].to(dtype), atol=tolerance, rtol=0)
    expected = tensors["grad.enc.conv1.weight"].to(dtype)
    torch.testing.assert_close(encoder.conv1.weight.grad, expected, atol=tolerance, rtol=0)
