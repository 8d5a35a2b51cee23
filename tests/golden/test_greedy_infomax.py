"""Greedy InfoMax's context network and loss, reproduced from its weights."""

import torch

from cpc_ext.models import GatedPixelCNNContext
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


def test_info_nce(golden):
    problem = golden("greedy_infomax.info_nce")
    config, tensors = problem.config, problem.tensors
    steps, samples = config["pred_steps"], config["neg_samples"]
    objective = GridInfoNCE(
        config["in_channels"], pred_steps=steps, skip=config["skip_step"], neg_samples=samples
    ).double()
    matrices = [tensors[f"state.W_k.{step}.weight"][:, :, 0, 0] for step in range(steps)]
    objective.load_state_dict({"weight": torch.stack(matrices).unsqueeze(0)})
    encodings, contexts = tensors["z"].requires_grad_(), tensors["c"].requires_grad_()

    output = objective(
        encodings.unsqueeze(0),
        contexts.unsqueeze(0),
        negatives=[tensors[f"negatives.{step}"].view(-1, samples) for step in range(steps)],
    )
    output.loss.backward()

    torch.testing.assert_close(output.loss, tensors["loss"], **LOG_EPSILON_TOLERANCE)
    torch.testing.assert_close(encodings.grad, tensors["grad_z"], **LOG_EPSILON_TOLERANCE)
    torch.testing.assert_close(contexts.grad, tensors["grad_c"], **LOG_EPSILON_TOLERANCE)
    for step in range(steps):
        torch.testing.assert_close(
            objective.weight.grad[0, step], tensors[f"grad_W.{step}"][:, :, 0, 0], **LOG_EPSILON_TOLERANCE
        )
