"""CPC v2's context network: what a context can and cannot see."""

import pytest
import torch

from cpc_ext.models import ResidualContext


@pytest.mark.parametrize("padding", ["zeros", "lightning-bolts"])
def test_context_sees_rows_at_or_above_and_nothing_below(padding):
    torch.manual_seed(0)
    context = ResidualContext(8, hidden_channels=32, padding=padding).double()
    encodings = torch.randn(1, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    contexts = context(encodings)
    for row in range(5):
        for col in (0, 2, 4):
            # A context is cut off at zero; its sum over the channels sees what any of them does.
            (gradient,) = torch.autograd.grad(contexts[0, :, row, col].sum(), encodings, retain_graph=True)
            seen = (gradient[0] != 0).any(0)
            assert not seen[row + 1 :].any()
            if padding == "zeros":
                assert seen[: row + 1].all()


def test_other_grids():
    context = ResidualContext(4, hidden_channels=8)
    assert len(context.blocks) == 5
    assert context(torch.randn(2, 4, 3, 6)).shape == (2, 4, 3, 6)
    assert context(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)
    assert context(torch.randn(0, 4, 3, 6)).shape == (0, 4, 3, 6)
    assert context.out_channels == 4


def test_wrong_arguments():
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        ResidualContext(4, blocks=0)
    with pytest.raises(ValueError, match="padding must be one of zeros, lightning-bolts, got 'ones'"):
        ResidualContext(4, padding="ones")
    with pytest.raises(ValueError, match=r"encodings must be \[B, 4, rows, cols\], got shape \(2, 3, 5, 5\)"):
        ResidualContext(4)(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="at least 3 columns, got 2"):
        ResidualContext(4, padding="lightning-bolts")(torch.zeros(2, 4, 5, 2))
