"""Delta-orthogonal initialization: the middle tap is orthogonal, and all others are zero."""

import pytest
import torch

from cpc_ext.nn import delta_orthogonal_


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (3, 5, 1, 3), (4, 4, 5, 1)])
def test_the_middle_tap_is_orthogonal_and_alone(shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert delta_orthogonal_(weight, 2.0, torch.Generator().manual_seed(0)) is weight
    again = delta_orthogonal_(torch.randn(shape, dtype=torch.float64), 2.0, torch.Generator().manual_seed(0))
    assert torch.equal(again, weight)
    middle = again[:, :, shape[2] // 2, shape[3] // 2].clone()
    again[:, :, shape[2] // 2, shape[3] // 2] = 0
    assert not again.any()
    small = middle if shape[0] < shape[1] else middle.T
    torch.testing.assert_close(small @ small.T, 4 * torch.eye(len(small), dtype=torch.float64), rtol=0, atol=1e-12)
    assert delta_orthogonal_(weight).square().sum().item() == pytest.approx(min(shape[:2]))


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 2, 2, 3), (2, 2, 3, 2), (2, 2, 3, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"weight must be \[O, I, kh, kw\] with odd kernel sizes, got shape"):
        delta_orthogonal_(torch.zeros(shape))
