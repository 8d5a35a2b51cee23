"""Linear probes: how well a linear classifier tells the classes from frozen encodings.

From image sets to features [N, D], then multinomial logistic regression by full-batch L-BFGS, the strength of its
regularisation chosen on a held-out part of the training set. Nothing is random but that part, which is the same for
every probe of a data set, so that two encoders are judged alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.data import ImageFetcher, ImageSet

__all__ = ["ProbeResult", "encode", "linear_probe"]

# From strong regularisation to hardly any, for features of unit variance.
_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_HELD_OUT = 0.2
_ENCODE_BATCH = 50
_MAX_ITERATIONS = 200


@dataclass(frozen=True)
class ProbeResult:
    """accuracy: fraction of test images classified rightly. strength: the regularisation chosen for it."""

    accuracy: float
    strength: float


@torch.no_grad()
def encode(images: ImageSet, features: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Features of all images, float32 [N, D] on the CPU. features: uint8 [B, C, H, W] on the device to [B, D]."""
    fetch = ImageFetcher(images, device, resident=False)
    batches = [
        features(fetch(np.arange(start, min(start + _ENCODE_BATCH, len(images))))).float()
        for start in range(0, len(images), _ENCODE_BATCH)
    ]
    return torch.cat(batches).cpu()


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, classes: int
) -> ProbeResult:
    """Fit multinomial logistic regression and measure it.

    Args:
        train_features, test_features: floating [N, D], standardised here by the training features' mean and deviation.
        train_labels, test_labels: int64 [N] in 0..classes-1.
        classes: number of classes.

    Raises:
        ValueError: fewer than two training images, of which one is held out.
    """
    count = len(train_labels)
    if count < 2:
        raise ValueError(f"train_features: expected at least 2 images, got {count}")
    mean = train_features.double().mean(0)
    # A feature that never varies carries nothing; dividing by its deviation of zero would make it carry NaN.
    deviation = train_features.double().std(0).clamp(min=1e-6)
    train, test = ((features.double() - mean) / deviation for features in (train_features, test_features))

    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out, kept = order.split([max(1, round(count * _HELD_OUT)), count - max(1, round(count * _HELD_OUT))])
    scores: dict[float, float] = {}
    weights = train.new_zeros(classes, train.shape[1] + 1)
    for strength in _STRENGTHS:
        # Weaker regularisation starts from the solution of the stronger, which is near.
        weights = _fit(train[kept], train_labels[kept], weights, strength)
        scores[strength] = _accuracy(weights, train[held_out], train_labels[held_out])
    strength = max(scores, key=lambda each: scores[each])  # The stronger of equals, as it comes first.
    weights = _fit(train, train_labels, torch.zeros_like(weights), strength)
    return ProbeResult(accuracy=_accuracy(weights, test, test_labels), strength=strength)


def _fit(features: Tensor, labels: Tensor, start: Tensor, strength: float) -> Tensor:
    """Weights [classes, D + 1], biases last, that minimise mean cross-entropy + strength / 2 * |weights|²."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=_MAX_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(weights, features), labels) + strength / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _logits(weights: Tensor, features: Tensor) -> Tensor:
    return F.linear(features, weights[:, :-1], weights[:, -1])


def _accuracy(weights: Tensor, features: Tensor, labels: Tensor) -> float:
    return (_logits(weights, features).argmax(1) == labels).double().mean().item()
