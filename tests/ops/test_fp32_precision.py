"""PyTorch's old and new switches that let kernels round float32 to TF32, and their effect on sampling."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cpc_ext.models import GatedPixelCNN, PixelCNN
from cpc_ext.ops import _library as library
from cpc_ext.ops import info_nce, masked_conv2d
from cpc_ext.ops.masked_conv2d import PixelConvolution

SETTINGS = {
    "torch.backends.fp32_precision": ("ieee", "tf32"),
    "torch.backends.cudnn.fp32_precision": ("ieee", "tf32"),
    "torch.backends.cudnn.conv.fp32_precision": ("ieee", "tf32"),
    "torch.backends.cuda.matmul.fp32_precision": ("ieee", "tf32"),
    "torch.backends.cudnn.allow_tf32": (True, False),
    "torch.backends.cuda.matmul.allow_tf32": (True, False),
}
# Prints for each argument, a program of settings, what ops may round afterwards, according to us and to PyTorch.
SCRIPT = """
import os, sys, torch
from cpc_ext.ops import info_nce, masked_conv2d
from cpc_ext.ops import _library as library
class OnGPU:
    is_cuda = True
for settings in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(settings)
        tensors = torch.ones(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 1, 1, requires_grad=True)
        masked_conv2d(*tensors, mask=torch.ones(1, 1, dtype=torch.bool)).sum().backward()
        info_nce(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)).loss.backward()
        kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        print(
            *(int(library.tf32_allowed(OnGPU, work)) for work in ("convolution", "product")),
            *(int(kind.fp32_precision == "tf32") for kind in kinds),
            flush=True,
        )
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"fails after {settings}")
"""


def answers(*programs):
    """Return, for each program, whether convolutions and products may be rounded, according to the ops and PyTorch."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *programs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [[word == "1" for word in line.split()] for line in done.stdout.splitlines()]
    return [(tuple(line[:2]), tuple(line[2:])) for line in lines]


def test_each_switch_alone():
    expected = {
        "pass": (True, False),  # As PyTorch's own convolutions and products.
        "torch.backends.cudnn.allow_tf32 = False": (False, False),
        "torch.backends.cuda.matmul.allow_tf32 = True": (True, True),
        "torch.set_float32_matmul_precision('high')": (True, True),
        "torch.backends.fp32_precision = 'ieee'": (False, False),
        "torch.backends.fp32_precision = 'tf32'": (True, True),
        "torch.backends.cudnn.fp32_precision = 'ieee'": (False, False),
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'": (False, False),
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'": (True, True),
    }
    found = dict(zip(expected, answers(*expected), strict=True))
    assert {program: ours for program, (ours, _) in found.items()} == expected | {
        # PyTorch 2.11 does not hand these on to convolutions.
        program: theirs
        for program, (_, theirs) in found.items()
        if program in ("torch.backends.fp32_precision = 'ieee'", "torch.backends.cudnn.fp32_precision = 'ieee'")
    }


def test_every_pair_of_switches():
    """Whatever PyTorch makes of old and new switches side by side, no op raises, and PyTorch's answer is taken."""
    each = [f"{name} = {value!r}" for name, values in SETTINGS.items() for value in values]
    pairs = [f"{one}; {other}" for one, other in itertools.permutations(each, 2)]
    results = answers(*pairs)
    assert len(results) == len(pairs)
    assert all(ours == theirs for ours, theirs in results)


def test_the_cpu_asks_no_switch(monkeypatch):
    monkeypatch.setattr(library, "_FP32_PRECISIONS", {})
    monkeypatch.setattr(library, "native", SimpleNamespace())
    assert not library.tf32_allowed(torch.ones(1), "product")


@pytest.fixture(params=["ieee", "tf32"])
def precision(request, device):
    """The precision set for convolutions and products; ``device`` has switched TF32 off."""
    kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = request.param
    yield request.param
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value


@pytest.fixture
def rounds(request, device):
    """Return whether a device's kernels may round to TF32: those of CUDA may, also emulated ones."""
    return request.node.callspec.params["device"] != "cpu"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ops_round_where_they_may(device, rounds, precision):
    mask = torch.ones(3, 3, dtype=torch.bool, device=device)
    input, weight = draw(2, 16, 6, 6), draw(16, 16, 3, 3, seed=1)
    queries, keys = draw(64, 32), draw(64, 32, seed=1)
    for actual, exact in (
        (
            masked_conv2d(input.to(device), weight.to(device), mask=mask),
            masked_conv2d(input.to(device).double(), weight.to(device).double(), mask=mask),
        ),
        (
            info_nce(queries.to(device), keys.to(device), reduction="none").loss,
            info_nce(queries.to(device).double(), keys.to(device).double(), reduction="none").loss,
        ),
    ):
        error = ((actual - exact).abs().max() / exact.abs().max()).item()
        if precision == "tf32" and rounds:
            assert 2**-16 < error < 2**-8
        else:  # Tensor cores cut digits off each sum of the three products that stand for a float32 one.
            assert error < (2**-18 if rounds else 2**-19)


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
def test_a_pixel_alone_is_that_of_the_whole_image(device, rounds, precision, activation):
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]], device=device)
    input = draw(2, 16, 5, 4).to(device).contiguous(memory_format=torch.channels_last)
    weight, bias = draw(32, 16, 3, 3, seed=1).to(device), draw(32, seed=2).to(device)
    whole = masked_conv2d(input, weight, bias, mask=mask, activation=activation)
    alone = torch.zeros_like(whole)
    convolution = PixelConvolution(weight, bias, mask=mask, activation=activation)
    for row, col in itertools.product(range(5), range(4)):
        convolution(input, alone, torch.tensor([row, col], device=device))
    if rounds:
        assert torch.equal(alone, whole)  # No pairs of pixels there.
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: PixelCNN(3, hidden_channels=6, layers=1),
                                  lambda: GatedPixelCNN(3, channels=6, layers=2)])  # fmt: skip
@torch.no_grad()
def test_cached_samples_are_those_of_the_whole_network(request, device, precision, make):
    side = 3 if request.node.callspec.params["device"] == "emulated" else 4  # A whole network a value takes a while.
    torch.manual_seed(0)
    model = make().to(device)
    for parameter in model.parameters():
        parameter.mul_(3)  # Weights that rounding changes draws with.
    noise = torch.empty(1, 3, side, side, 256).exponential_(generator=torch.Generator().manual_seed(0))
    noise = noise.log_().neg_().to(device)
    kept, naive = (model.sample(1, side, noise=noise, cached=cached) for cached in (True, False))
    assert torch.equal(kept, naive)
