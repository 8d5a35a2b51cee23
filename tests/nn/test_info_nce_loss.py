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


def test_takes_what_the_op_takes():
    queries, keys = torch.randn(3, 4), torch.randn(3, 4)
    options = {
        "key_range": torch.tensor([[0, 2], [0, 3], [1, 3]]),
        "key_bias": torch.randn(3),
        "groups": (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])),
        "contrast": "other",
        "symmetric": True,
    }
    for left_out in options:
        given = {name: value for name, value in options.items() if name != left_out}
        if left_out in ("groups", "contrast"):
            given = {name: value for name, value in options.items() if name not in ("groups", "contrast")}
        torch.testing.assert_close(InfoNCELoss(0.2)(queries, keys, **given), info_nce(queries, keys, scale=5, **given))
    torch.testing.assert_close(InfoNCELoss(0.2)(queries, keys, **options), info_nce(queries, keys, scale=5, **options))


def test_a_temperature_is_learnt_within_its_bound():
    queries, keys = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    loss = InfoNCELoss(0.2, learnable=True, max_scale=6).double()
    log_scale = torch.tensor(5.0).log().double().requires_grad_()
    expected = info_nce(queries, keys, scale=log_scale.exp()).loss
    value = loss(queries, keys).loss
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, loss.log_scale), torch.autograd.grad(expected, log_scale))
    with torch.no_grad():
        loss.log_scale.add_(3)
    torch.testing.assert_close(loss(queries, keys).loss, info_nce(queries, keys, scale=6).loss)
    torch.testing.assert_close(loss.log_scale.exp().item(), 6.0)
    assert not InfoNCELoss().state_dict()
    assert InfoNCELoss(0.25, learnable=True, max_scale=4).log_scale.exp() == 4
