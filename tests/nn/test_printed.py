"""Printed, layers and losses say what they were made with."""

import pytest
import torch

from cpc_ext import nn


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            nn.GridInfoNCE(3, 4, pred_steps=2, pred_directions=5, skip=0, neg_samples=7),
            "3, 4, pred_steps=2, pred_directions=5, skip=0, neg_samples=7",
        ),
        (
            nn.TargetInfoNCE(3, pred_steps=2, pred_directions=5, skip=0, scale=0.3, reduction="sum"),
            "pred_steps=2, pred_directions=5, skip=0, scale=0.3, reduction=sum",
        ),
        (nn.InfoNCELoss(0.2, reduction="sum"), "temperature=0.2, reduction=sum"),
        (
            nn.NTXentLoss(0.2, gather_negatives="ring", statistics=False),
            "temperature=0.2, gather_negatives=ring, statistics=False",
        ),
        (nn.Patchify(8, 6, gray=True), "patch_size=8, stride=6, gray=True"),
        (nn.MaskedConv2d(3, 4, (1, 5), "A"), "3, 4, kernel_size=(1, 5), mask=A"),
        (nn.MaskedConv2d(3, 4, 3, torch.ones(3, 3)), "3, 4, kernel_size=(3, 3), mask=custom"),
        (nn.ShiftedConv2d(3, 4, (2, 3), "down", stride=2), "3, 4, kernel_size=(2, 3), down, stride=2"),
        (nn.ShiftedConvTranspose2d(3, 4, (2, 2), "down-right"), "3, 4, kernel_size=(2, 2), down-right"),
        (nn.ChannelMix(8, 3, sources=2), "8, 3, sources=2"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_printed(module, text):
    assert module.extra_repr() == text
