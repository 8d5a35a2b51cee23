"""Networks exported with dynamic sizes, and run with other sizes."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from cpc_ext.models import (
    GatedPixelCNNContext,
    PixelCNN,
    PixelCNNPP,
    RecurrentContext,
    ResNetV2Encoder,
    WaveformEncoder,
)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bytes_like(*shape):
    return (draw(*shape).abs() * 100).to(torch.uint8)


# A network, what it is exported with, which of its sizes are left open, and what it is run with.
CASES = {
    # Sizes for which the CPU's convolutions are faster, and others.
    "encoder": (
        lambda: ResNetV2Encoder(blocks=(1, 1), channels=(64, 64), stem_channels=64, stem="cifar"),
        draw(2, 2, 2, 3, 8, 8),
        (0, 1, 2),
        draw(9, 3, 5, 3, 8, 8),
    ),
    "sound": (lambda: WaveformEncoder(8, norm="channel"), draw(2, 1, 2000), (0, 2), draw(3, 1, 3017)),
    "context": (lambda: GatedPixelCNNContext(4, 2), draw(2, 4, 3, 3), (0, 2, 3), draw(3, 4, 5, 7)),
    # PyTorch itself takes the length of a recurrent network's input for a constant.
    "recurrent context": (lambda: RecurrentContext(4, 3), draw(2, 4, 6), (0,), draw(5, 4, 6)),
    "pixels": (
        lambda: PixelCNN(hidden_channels=3, layers=1),
        bytes_like(2, 3, 4, 4),
        (0, 2, 3),
        bytes_like(3, 3, 5, 6),
    ),
    "mixtures": (
        lambda: PixelCNNPP(1, channels=2, blocks=1, mixtures=1),
        bytes_like(2, 1, 8, 8),
        (0,),
        bytes_like(3, 1, 8, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_may_be_left_open(name):
    make, small, sizes, large = CASES[name]
    torch.manual_seed(0)
    network = make().eval()
    exported = export(network, (small,), dynamic_shapes=(dict.fromkeys(sizes, Dim.DYNAMIC),))
    torch.testing.assert_close(exported.module()(large), network(large), atol=1e-5, rtol=1e-4)


def test_encoders_are_exported_as_what_pytorch_has():
    """So that whoever loads them needs nothing of ours."""
    make, _, _, large = CASES["encoder"]
    exported = export(make().eval(), (large,))
    assert not [node.target for node in exported.graph.nodes if "cpc_ext" in str(node.target)]
