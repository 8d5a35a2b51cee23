"""Supervised contrast: the positives of each view are the views of all samples of its class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpc_ext.nn.typed import Module
from cpc_ext.ops._checks import check_dense, check_floating
from cpc_ext.ops._contrast import contrast
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_positive
from cpc_ext.ops._library import values_at_hand, without_autocast

__all__ = ["SupConLoss"]


class SupConLoss(Module):
    """Supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362, equation 2, L_out).

    ``(τ / τ_base) (log Σ_{a ∈ A(i)} exp(z_i·z_a / τ) - mean over p ∈ P(i) of z_i·z_p / τ)``, the mean over the anchors
    i; A(i) are all views but i, and P(i) those of them in the class of i. An anchor with an empty P(i) counts as 0.
    Arguments and results are those of the published program's ``SupConLoss`` (HobbitLong/SupContrast).

    The mean over positives is linear in their features, so sums over classes suffice for any number of positives, and
    memory is that of the features.

    Args:
        temperature: τ.
        contrast_mode: the views that are anchors: "all", or "one" for only the first of each sample.
        base_temperature: τ_base.

    Raises:
        TypeError, ValueError: an argument of another type or value.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            check_positive(name, value)
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode must be one of all, one, got {contrast_mode!r}")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch, a scalar in float32, or float64 for float64 inputs.

        Args:
            features: floating [B, views, ...], usually of length 1 over the remaining dimensions.
            labels: [B], the samples' classes, any numbers.
            mask: in place of labels, [B, B] of bool or non-negative numbers: the weight of sample n as a positive of
                sample m. With neither, each sample is a class of its own, which is the loss of SimCLR.

        Raises:
            TypeError, ValueError: an argument of the wrong shape or type; both labels and mask.
        """
        _check(features, labels, mask)
        # [views * B, D], all first views before all second ones.
        keys = features.flatten(2).transpose(0, 1).flatten(0, 1)
        # Gradients of log-sums and of similarities nearly cancel: rounding each to 16 bits leaves little of their sum.
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        anchors = keys[: features.shape[0]] if self.contrast_mode == "one" else keys
        with without_autocast(features.device):
            if mask is None:
                weights, similarity = _of_classes(anchors, keys, _classes(labels, features.shape[0], features.device))
            else:
                weights, similarity = _of_mask(anchors, keys, mask)
            options = ContrastOptions(
                1 / self.temperature, weights=weights, exclude=torch.arange(anchors.shape[0], device=features.device)
            )
            # For a sum with known weights, the op forms the gradient in the same pass.
            log_sums = contrast(anchors, keys, options, measure="log_sum", reduction="sum").loss
            loss = (log_sums - similarity() / self.temperature) / anchors.shape[0]
            return loss * (self.temperature / self.base_temperature)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode}, "
            f"base_temperature={self.base_temperature}"
        )


def _check(features: Tensor, labels: Tensor | None, mask: Tensor | None) -> None:
    check_floating("features", features)
    for name, value in (("labels", labels), ("mask", mask)):
        if value is not None:
            check_dense(name, value)
    if features.ndim < 3 or features.numel() == 0:
        raise ValueError(f"features must be [B, views, ...], each at least 1, got {tuple(features.shape)}")
    if labels is not None and mask is not None:
        raise ValueError("labels and mask cannot both be given")
    samples = features.shape[0]
    if labels is not None and labels.numel() != samples:
        raise ValueError(f"labels must have shape ({samples},), got {tuple(labels.shape)}")
    if mask is not None and mask.shape != (samples, samples):
        raise ValueError(f"mask must have shape ({samples}, {samples}), got {tuple(mask.shape)}")
    if mask is not None and mask.dtype != torch.bool and values_at_hand(mask) and (least := mask.min().item()) < 0:
        raise ValueError(f"mask must not be negative, got {least:g}")


def _classes(labels: Tensor | None, samples: int, device: torch.device) -> Tensor:
    """Number the classes from 0, int64 [B]. torch.unique would wait for the device to know its result's size."""
    if labels is None:
        return torch.arange(samples, device=device)
    ordered, order = labels.to(device).reshape(-1).sort()
    new = torch.cat([ordered.new_zeros(1, dtype=torch.int64), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0))


def _of_classes(anchors: Tensor, keys: Tensor, classes: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """Return weights [M], 1 for anchors with positives, and a function of the anchors' similarity to their positives.

    The function sums, over the anchors, the mean dot product with positives. It is called after the contrast, when that
    has freed its memory.
    """
    samples = classes.shape[0]

    def sums(values: Tensor) -> Tensor:
        """Sum values [views * B, ...] over the members of each class, [B, ...]."""
        per_sample = values.unflatten(0, (-1, samples)).sum(0)
        return torch.zeros_like(per_sample).index_add(0, classes, per_sample)

    positives = sums(keys.new_ones(keys.shape[0])) - 1

    def similarity() -> Tensor:
        of_keys = sums(keys)
        # All anchors of a class have the same number of positives: its keys except themselves.
        of_anchors = of_keys if anchors.shape[0] == keys.shape[0] else sums(anchors)
        similar = (of_anchors * of_keys).sum(1) - sums(_squared_lengths(anchors))
        return torch.where(positives > 0, similar / positives.clamp_min(1), 0).sum()

    return (positives > 0).to(keys.dtype)[classes].repeat(anchors.shape[0] // samples), similarity


def _squared_lengths(features: Tensor) -> Tensor:
    """Return squared lengths [M] of features [M, D]. A plain square would form its gradient twice, and add both."""
    constant = features.detach()
    return 2 * (features * constant).sum(1) - (constant * constant).sum(1)


def _of_mask(anchors: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """Return what :func:`_of_classes` does, given a weight for each pair of samples."""
    samples = mask.shape[0]
    mask = mask.to(keys.device, keys.dtype)
    views = keys.shape[0] // samples
    own = mask.diagonal()
    positives = views * mask.sum(1) - own
    share = 1 / torch.where(positives < 1e-6, 1, positives)

    def similarity() -> Tensor:
        of_samples = mask @ keys.unflatten(0, (views, samples)).sum(0)
        of_views = anchors.unflatten(0, (-1, samples))
        # An anchor is not among its own positives.
        similar = of_views * of_samples - own.unsqueeze(1) * of_views**2
        return torch.vdot(similar.sum(2).sum(0), share)

    return (positives * share).repeat(anchors.shape[0] // samples), similarity
