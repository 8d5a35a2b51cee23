"""The gated PixelCNN context network: what a context can and cannot see."""

import pytest
import torch

from cpc_ext.models import GatedPixelCNNContext


def test_context_sees_rows_at_or_above_and_nothing_below():
    context = GatedPixelCNNContext(4).double()
    encodings = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    for row in range(5):
        for col in (0, 2, 4):
            (gradient,) = torch.autograd.grad(context(encodings)[0, :, row, col].sum(), encodings)
            seen = (gradient[0] != 0).any(0)
            assert not seen[row + 1 :].any()
            # Four layers of 3-wide kernels reach every column of a 5-wide grid, in all rows at or above.
            assert seen[: row + 1].all()


def test_one_layer_and_other_grids():
    context = GatedPixelCNNContext(4, layers=1)
    assert context(torch.randn(2, 4, 3, 6)).shape == (2, 4, 3, 6)
    assert context(torch.randn(0, 4, 3, 6)).shape == (0, 4, 3, 6)
    assert context.out_channels == 4


def test_first_and_last_layers_have_no_vertical_residual():
    context = GatedPixelCNNContext(4)
    assert [layer.residual_vertical is not None for layer in context.layers] == [False, True, True, False]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        GatedPixelCNNContext(4, layers=0)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        GatedPixelCNNContext(0)
    with pytest.raises(ValueError, match=r"encodings must be \[B, 4, rows, cols\], got shape \(2, 3, 5, 5\)"):
        GatedPixelCNNContext(4)(torch.zeros(2, 3, 5, 5))
