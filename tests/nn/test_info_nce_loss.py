"""The InfoNCE module is the op with a fixed temperature."""

import pytest
import torch

from cpc_ext.nn import InfoNCELoss
from cpc_ext.ops import info_nce


def test_is_the_op_at_a_temperature():
    queries, keys = torch.randn(3, 4), torch.randn(5, 4)
    targets, negatives = torch.tensor([0, 1, 4]), torch.randint(5, (3, 2))
    weights, exclude = torch.rand(3), torch.tensor([1, 2, 3])
    output = InfoNCELoss(0.2, reduction="sum")(
        queries, keys, targets, negatives=negatives, weights=weights, exclude=exclude
    )
    expected = info_nce(
        queries, keys, targets, negatives=negatives, scale=5, weights=weights, exclude=exclude, reduction="sum"
    )
    torch.testing.assert_close(output, expected)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        InfoNCELoss(0)
