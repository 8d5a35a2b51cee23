"""The effective rank of encodings: its formula, and its range from a collapse to equal variance in all directions."""

from __future__ import annotations

import math

import pytest
import torch

from cpc_ext.measures.effective_rank import effective_rank


def test_directions_that_vary_alike_count_fully():
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)])
    assert effective_rank(signs) == pytest.approx(3.0)
    assert effective_rank(signs @ torch.rand(3, 9)) <= 3.0
    assert effective_rank(5 + 1e-3 * signs) == pytest.approx(3.0, rel=1e-4)


def test_by_the_formula():
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    shares = (0.75, 0.25)
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(signs * torch.tensor([3.0, 1.0])) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapse(dtype):
    line = torch.linspace(-1, 1, 50)[:, None] * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    assert effective_rank(line.to(dtype)) < (1.001 if dtype == torch.float32 else 1.2)
    assert effective_rank(torch.full((50, 16), 0.3, dtype=dtype)) == 0.0
    assert effective_rank(torch.zeros(50, 16, dtype=dtype)) == 0.0
    alike = torch.randn(1, 16).repeat(50, 1) * (1 + 1e-7 * torch.randn(50, 1))
    assert effective_rank(alike) == 0.0
    assert effective_rank(torch.randn(1, 16)) == 0.0
