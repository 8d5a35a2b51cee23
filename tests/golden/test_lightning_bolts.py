"""Lightning Bolts' context network, reproduced from its weights."""

import torch

from cpc_ext.models import ResidualContext

EXACT = {"atol": 1e-10, "rtol": 0}
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
