"""Lightning Bolts' context network, CPC v2 objective and NT-Xent, reproduced from their weights."""

import pytest
import torch

from cpc_ext.models import ResidualContext
from cpc_ext.nn import NTXentLoss, TargetInfoNCE
from cpc_ext.ops import info_nce

EXACT = {"atol": 1e-10, "rtol": 0}
TOLERANCES = {torch.float64: EXACT, torch.float32: {"atol": 1e-5, "rtol": 1e-5}}
# A block's convolutions by their places there, where the even ones are ReLUs and padding.
NAMES = {"0": "reduce", "2": "sideways", "4": "upwards", "6": "expand"}


def rename(state):
    renamed = {}
    for name, value in state.items():
        blocks, block, place, parameter = name.split(".")
        renamed[f"{blocks}.{block}.{NAMES[place]}.{parameter}"] = value
    return renamed


def test_pixelcnn(golden):
    problem = golden("lightning_bolts.pixelcnn")
    config = problem.config
    context = ResidualContext(
        config["in_channels"], config["hidden_channels"], config["num_blocks"], padding="lightning-bolts"
    ).double()
    context.load_state_dict(rename(problem.state()))
    encodings = problem.tensors["z"].requires_grad_()

    contexts = context(encodings)
    contexts.backward(problem.tensors["grad_y"])

    torch.testing.assert_close(contexts, problem.tensors["y"], **EXACT)
    torch.testing.assert_close(encodings.grad, problem.tensors["grad_z"], **EXACT)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_cpc_task(golden, dtype):
    problem = golden("lightning_bolts.cpc_task")
    config = problem.config
    context = ResidualContext(
        config["in_channels"], config["hidden_channels"], config["num_blocks"], padding="lightning-bolts"
    ).to(dtype)
    context.load_state_dict(rename(problem.state("state.context_cnn.")))
    objective = TargetInfoNCE(
        config["in_channels"],
        target_channels=config["target_dim"],
        scale=config["embed_scale"],
        reduction="lightning-bolts",
    ).to(dtype)
    objective.target_projection.load_state_dict(problem.state("state.target_cnn."))
    objective.prediction_projection.load_state_dict(problem.state("state.pred_cnn."))
    encodings = problem.tensors["z"].to(dtype).requires_grad_()

    output = objective(encodings[None], context(encodings)[None])
    output.loss.backward()

    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.loss, problem.tensors["loss"].to(dtype), **tolerance)
    torch.testing.assert_close(encodings.grad, problem.tensors["grad_z"].to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nt_xent(golden, dtype):
    problem = golden("lightning_bolts.nt_xent")
    first, second = (problem.tensors[name].to(dtype).requires_grad_() for name in ("z1", "z2"))

    loss = NTXentLoss(problem.config["temperature"])(first, second)
    loss.backward()

    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(loss, problem.tensors["loss"].to(dtype), **tolerance)
    for features, name in ((first, "grad_z1"), (second, "grad_z2")):
        # The program's gradients are those of features that are already normalised; ours pass through normalising,
        # which takes away their part along the features.
        unit, expected = features.detach(), problem.tensors[name].to(dtype)
        expected = expected - (expected * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(features.grad, expected, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nt_xent_as_info_nce_with_exclude(golden, dtype):
    problem = golden("lightning_bolts.nt_xent")
    first, second = (problem.tensors[name].to(dtype).requires_grad_() for name in ("z1", "z2"))
    views = torch.cat([first, second])
    own = torch.arange(len(views))

    output = info_nce(views, views, own.roll(len(first)), scale=1 / problem.config["temperature"], exclude=own)
    output.loss.backward()

    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.loss, problem.tensors["loss"].to(dtype), **tolerance)
    torch.testing.assert_close(first.grad, problem.tensors["grad_z1"].to(dtype), **tolerance)
    torch.testing.assert_close(second.grad, problem.tensors["grad_z2"].to(dtype), **tolerance)
