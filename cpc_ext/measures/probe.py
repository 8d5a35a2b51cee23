"""Linear probes: how well a linear classifier predicts classes from frozen encodings.

The classifier is multinomial logistic regression on features [N, D], fitted by full-batch L-BFGS. The strength of its
regularisation is chosen on held-out parts of the training set. Only the choice of these parts is random, and it is the
same for every probe of a data set, so that two encoders are judged alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.data import ImageFetcher, ImageSet
from cpc_ext.measures.finite import check_finite

__all__ = [
    "LinearClassifier",
    "ProbeResult",
    "apart",
    "encode",
    "fit_linear_classifier",
    "linear_probe",
    "mean_and_deviation",
]

# From strong regularisation to hardly any, for features of unit variance.
_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_HELD_OUT = 0.2
# Number of held-out images to choose the strength by. If a fifth of the labels is fewer, up to all five fifths are held
# out in turn.
_ENOUGH_HELD_OUT = 200
_ENCODE_BATCH = 50
_MAX_ITERATIONS = 200
# Number of rounding errors that may have added up in a feature which never varies.
_ROUNDINGS = 8


@dataclass(frozen=True)
class ProbeResult:
    """accuracy: fraction of test images classified correctly. strength: chosen strength of the regularisation."""

    accuracy: float
    strength: float


@dataclass(frozen=True)
class LinearClassifier:
    """Multinomial logistic regression on standardised features, in double precision.

    weights: [classes, D + 1], biases last. mean, deviation: [D], of the features that it was fitted to, see
    :func:`mean_and_deviation`. strength: chosen strength of the regularisation.
    """

    weights: Tensor
    mean: Tensor
    deviation: Tensor
    strength: float

    def logits(self, features: Tensor) -> Tensor:
        """Return logits of the classes, float64 [N, classes], for features, floating [N, D]."""
        return _logits(self.weights, (features.double() - self.mean) / self.deviation)


@torch.no_grad()
def encode(
    images: ImageSet,
    features: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    chosen: np.ndarray | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """Return features of images, float32 [N, D] on the CPU.

    features: maps uint8 [B, C, H, W] on the device to [B, D]. chosen: indices of images, int64 [N]; None takes all.
    progress: wraps the range of batches, as tqdm does.
    """
    fetch = ImageFetcher(images, device, resident=False)
    indices = np.arange(len(images)) if chosen is None else chosen
    batches = [
        features(fetch(indices[start : start + _ENCODE_BATCH])).float()
        for start in progress(range(0, len(indices), _ENCODE_BATCH))
    ]
    return torch.cat(batches).cpu()


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, classes: int
) -> ProbeResult:
    """Fit multinomial logistic regression and measure it.

    Args:
        train_features, test_features: floating [N, D].
        train_labels, test_labels: int64 [N] in 0..classes-1.
        classes: number of classes.

    Raises:
        ValueError: fewer than two training images, as one is held out, or features that are not finite.
    """
    check_finite("test_features", test_features)
    classifier = fit_linear_classifier(train_features, train_labels, classes=classes)
    accuracy = (classifier.logits(test_features).argmax(1) == test_labels).double().mean().item()
    return ProbeResult(accuracy=accuracy, strength=classifier.strength)


def fit_linear_classifier(features: Tensor, labels: Tensor, *, classes: int) -> LinearClassifier:
    """Fit multinomial logistic regression of labels, int64 [N], on features, floating [N, D].

    The features are standardised by their own mean and deviation.

    Raises:
        ValueError: fewer than two images, as one is held out, or features that are not finite.
    """
    count = len(labels)
    if count < 2:
        raise ValueError(f"features: expected at least 2 images, got {count}")
    check_finite("features", features)
    with torch.inference_mode(False), torch.enable_grad():
        return _fit_with_strength(apart(features), apart(labels), classes)


def _fit_with_strength(features: Tensor, labels: Tensor, classes: int) -> LinearClassifier:
    """Fit the classifier with the regularisation strength that classifies the most held-out images correctly."""
    mean, deviation = mean_and_deviation(features.double(), made_in=features.dtype)
    standardised = (features.double() - mean) / deviation

    held_out, kept = _splits(len(labels))
    weights = standardised.new_zeros(len(kept), classes, features.shape[1] + 1)
    right: dict[float, int] = {}
    for strength in _STRENGTHS:
        # Weaker regularisation starts from the solution of the stronger, which is near.
        weights = _fit(standardised[kept], labels[kept], weights, strength)
        predicted = _logits(weights, standardised[held_out]).argmax(2)
        right[strength] = int((predicted == labels[held_out]).sum())
    strength = max(right, key=lambda each: right[each])  # Of equals, max takes the first, which is the strongest.
    weights = _fit(standardised[None], labels[None], torch.zeros_like(weights[:1]), strength)[0]
    return LinearClassifier(weights, mean, deviation, strength)


def apart(values: Tensor) -> Tensor:
    """Return the values detached from any graph, as normal tensors even if they were made in inference mode."""
    return values.clone() if values.is_inference() else values.detach()


def mean_and_deviation(
    features: Tensor, *, correction: int = 1, made_in: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation that standardise features [N, D] of any scale, [D] each.

    A feature that never varies carries only rounding errors; its deviation is set to infinity, which turns it into
    zeros.

    made_in: dtype whose rounding errors those are. None: that of the features.
    """
    deviation, mean = torch.std_mean(features, 0, correction=correction)
    # In 16 bits a difference of one step may be real, as features are computed more precisely than they are stored;
    # so no more than float32's rounding is assumed.
    rounding = min(torch.finfo(made_in or features.dtype).eps, torch.finfo(torch.float32).eps)
    return mean, torch.where(deviation > _ROUNDINGS * rounding * mean.abs(), deviation, torch.inf)


def _splits(count: int) -> tuple[Tensor, Tensor]:
    """Return indices of held-out and of kept images, [splits, images] each.

    There are as many splits as it takes to hold out enough images; no image is held out twice.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    size = max(1, round(count * _HELD_OUT))
    splits = min(-(-_ENOUGH_HELD_OUT // size), count // size)
    places = range(0, splits * size, size)
    held_out = [order[place : place + size] for place in places]
    kept = [torch.cat([order[:place], order[place + size :]]) for place in places]
    return torch.stack(held_out), torch.stack(kept)


def _fit(features: Tensor, labels: Tensor, start: Tensor, strength: float) -> Tensor:
    """Return weights that minimise mean cross-entropy + strength / 2 * |weights|² in each of S problems.

    The sum of all problems is minimised at once, since the time of small problems is mostly that of the calls.

    Args:
        features: [S, N, D]. labels: int64 [S, N]. start: weights to start from, [S, classes, D + 1], biases last.
    """
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=_MAX_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = _logits(weights, features)
        fit = len(logits) * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss = fit + strength / 2 * weights[..., :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _logits(weights: Tensor, features: Tensor) -> Tensor:
    """Return logits [..., N, classes] of weights [..., classes, D + 1] and features [..., N, D]."""
    return features @ weights[..., :-1].mT + weights[..., None, :, -1]
