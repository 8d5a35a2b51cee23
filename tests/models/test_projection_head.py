"""The head of siamese networks: its layers, by default those of checkpoints so far."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpc_ext.models.projection_head import projection_head


def test_default():
    head = projection_head(5, 3)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "0.weight": (12, 5),
        "0.bias": (12,),
        "2.weight": (3, 12),
        "2.bias": (3,),
    }


def test_three_layers_with_norm():
    """As SimCLR's own program has them."""
    head = projection_head(5, 3, layers=3, hidden=7, norm=True)
    assert [type(layer) for layer in head] == [*[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2, nn.Linear, nn.BatchNorm1d]
    x = torch.randn(8, 5)
    expected = x
    for index in (0, 3, 6):
        expected = F.batch_norm(expected @ head[index].weight.T, None, None, training=True)
        expected = expected.relu() if index < 6 else expected
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("name", ["layers", "hidden"])
def test_wrong_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        projection_head(5, 3, **{name: 0})
    with pytest.raises(ValueError, match="projection_channels must be at least 1, got 0"):
        projection_head(5, 0)
