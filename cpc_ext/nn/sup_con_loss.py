"""Supervised contrast: each view picks the views of all samples of its class out of the batch."""

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
    i; A(i) are all views but i, and P(i) those of them that are of i's class. An anchor without such counts as 0. It is
    called as the published program's ``SupConLoss`` is (HobbitLong/SupContrast), and gives the same.

    The mean over positives is linear in their features, so sums over classes are enough, whatever the number of
    positives: memory is that of the features.

    Args:
        temperature: τ.
        contrast_mode: which views are anchors, "all" or only the first, "one".
        base_temperature: τ_base.

    Raises:
        TypeError, ValueError: an argument that is none of those above.
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
        """The loss of a batch, a scalar in float32, or float64 for float64.

        Args:
            features: floating [B, views, ...], as a rule of length 1 over what is beyond the views.
            labels: [B], the samples' classes, any numbers.
            mask: in place of labels, [B, B] of non-negative numbers or bool: how much sample n is a positive of sample
                m. With neither, a sample is a class of its own, which is the loss of SimCLR.

        Raises:
            TypeError, ValueError: an argument of the wrong shape or type; both labels and mask.
        """
        _check(features, labels, mask)
        # [views * B, D], all first views before all second ones.
        keys = features.flatten(2).transpose(0, 1).flatten(0, 1)
        # The gradients of log-sums and of similarities nearly cancel: rounded to 16 bits each, little is left of them.
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
            # As a sum whose weights are known, it has its gradient formed in the same pass.
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
    """Classes numbered from 0, int64 [B]. Not by torch.unique, whose result is of a size that only the device knows."""
    if labels is None:
        return torch.arange(samples, device=device)
    ordered, order = labels.to(device).reshape(-1).sort()
    new = torch.cat([ordered.new_zeros(1, dtype=torch.int64), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0))


def _of_classes(anchors: Tensor, keys: Tensor, classes: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """Which anchors have positives, as weights [M]; the sum over anchors of the mean dot product with positives.

    The sum is computed when it is asked for: after the contrast, whose memory is free again by then.
    """
    samples = classes.shape[0]

    def sums(values: Tensor) -> Tensor:
        """[views * B, ...] summed over the members of each class, [B, ...]."""
        per_sample = values.unflatten(0, (-1, samples)).sum(0)
        return torch.zeros_like(per_sample).index_add(0, classes, per_sample)

    positives = sums(keys.new_ones(keys.shape[0])) - 1

    def similarity() -> Tensor:
        of_keys = sums(keys)
        # All anchors of a class have as many positives: its keys, but for themselves.
        of_anchors = of_keys if anchors.shape[0] == keys.shape[0] else sums(anchors)
        similar = (of_anchors * of_keys).sum(1) - sums(_squared_lengths(anchors))
        return torch.where(positives > 0, similar / positives.clamp_min(1), 0).sum()

    return (positives > 0).to(keys.dtype)[classes].repeat(anchors.shape[0] // samples), similarity


def _squared_lengths(features: Tensor) -> Tensor:
    """Squared lengths [M] of features [M, D]. A product with itself would have its gradient formed twice, and added."""
    constant = features.detach()
    return 2 * (features * constant).sum(1) - (constant * constant).sum(1)


def _of_mask(anchors: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """What :func:`_of_classes` gives, of a weight for each pair of samples."""
    samples = mask.shape[0]
    mask = mask.to(keys.device, keys.dtype)
    views = keys.shape[0] // samples
    own = mask.diagonal()
    positives = views * mask.sum(1) - own
    share = 1 / torch.where(positives < 1e-6, 1, positives)

    def similarity() -> Tensor:
        of_samples = mask @ keys.unflatten(0, (views, samples)).sum(0)
        of_views = anchors.unflatten(0, (-1, samples))
        # An anchor is none of its own positives.
        similar = of_views * of_samples - own.unsqueeze(1) * of_views**2
        return torch.vdot(similar.sum(2).sum(0), share)

    return (positives * share).repeat(anchors.shape[0] // samples), similarity
