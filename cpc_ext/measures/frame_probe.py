"""Frame probes: how well a classifier of single frames finds their labels, such as phones.

Features are [F, D], one row per frame. The classifier is linear or has one hidden layer. As there are many frames, it
is trained with minibatches, whose random draws are the same for all features, so that encoders are judged alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.measures.finite import check_finite
from cpc_ext.measures.probe import apart, mean_and_deviation
from cpc_ext.nn.typed import Module, ModuleList
from cpc_ext.training.random_streams import seeded

__all__ = [
    "FrameClassifier",
    "FrameProbeResult",
    "PhoneRecipe",
    "Summary",
    "frame_probe",
    "sequence_loss",
    "summary_of_frames",
]

PhoneRecipe = Literal["standard", "greedy-infomax", "cpc-audio"]
Summary = Literal["mean", "last"]

# Number of frames whose logits are in memory at a time.
_CHUNK = 16384


@dataclass(frozen=True)
class FrameProbeResult:
    """The result of a probe on the test frames.

    Attributes:
        accuracy: fraction of frames classified correctly.
        majority: accuracy of always naming the commonest class of the training frames.
        confusion: counts of frames, int64 [classes, classes], true class by row, predicted class by column.
    """

    accuracy: float
    majority: float
    confusion: Tensor


@dataclass(frozen=True)
class _Recipe:
    """Batches and length of a probe's training.

    group: number of consecutive frames that stay together; 0 keeps each utterance together. groups: groups in a batch.
    least_steps: minimum number of steps, for which epochs are added.
    """

    group: int
    groups: int
    epochs: int
    learning_rate: float
    least_steps: int = 0
    epsilon: float = 1e-8
    standardised: bool = False
    decayed: bool = False
    xavier: bool = False


_RECIPES: dict[str, _Recipe] = {
    "standard": _Recipe(
        group=1, groups=512, epochs=20, learning_rate=1e-2, least_steps=1000, standardised=True, decayed=True
    ),
    "greedy-infomax": _Recipe(group=0, groups=1, epochs=20, learning_rate=1e-4, xavier=True),
    # Batches of 8 windows of 20480 samples.
    "cpc-audio": _Recipe(group=128, groups=8, epochs=10, learning_rate=2e-4, epsilon=2e-8),
}


class FrameClassifier(Module):
    """A classifier of frames, features [..., D] → logits [..., classes].

    Args:
        dim: D.
        classes: number of classes.
        hidden: width of a hidden layer with ReLU, or 0 for a linear classifier.
    """

    def __init__(self, dim: int, classes: int, *, hidden: int = 0) -> None:
        super().__init__()
        widths = [dim, hidden, classes] if hidden else [dim, classes]
        self.layers = ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            features = torch.relu(layer(features))
        logits: Tensor = self.layers[-1](features)
        return logits

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of frames [..., D] with labels int64 [...]."""
        return F.cross_entropy(self(features).flatten(0, -2), labels.flatten())

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return the likeliest class of every frame, int64 [F], of features [F, D]."""
        return torch.cat([self(chunk).argmax(1) for chunk in features.split(_CHUNK)])


def frame_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    hidden: int = 0,
    recipe: PhoneRecipe = "standard",
    train_lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> FrameProbeResult:
    """Train a classifier of frames and measure it.

    Args:
        train_features, test_features: floating [F, D], utterances one after another; no utterance is in both.
        train_labels, test_labels: int64 [F] in 0..classes-1.
        classes: number of classes.
        hidden: width of a hidden layer, or 0 for a linear classifier.
        recipe: "standard" standardises features by the training frames and takes batches of frames. The others
            reproduce published programs: "greedy-infomax" takes one utterance per step, "cpc-audio" windows of 1.28 s.
        train_lengths: number of frames of each training utterance; needed by "greedy-infomax".
        seed: seed of the initial weights and of the order of batches.

    Raises:
        ValueError: an unknown recipe, labels out of range or not as many as frames, no frames, features that are not
            finite, or lengths that do not add up.
    """
    if recipe not in _RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(get_args(PhoneRecipe))}, got {recipe!r}")
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        _check_frames(name, features, labels, classes)
    how = _RECIPES[recipe]
    groups = _groups(len(train_labels), how, train_lengths)
    with torch.inference_mode(False), torch.enable_grad():
        train, test = apart(train_features).float(), apart(test_features).float()
        if how.standardised:
            mean, deviation = mean_and_deviation(train, correction=0)
            train, test = (train - mean) / deviation, (test - mean) / deviation
        classifier = _trained(train, apart(train_labels), groups, how, classes, hidden, seed)
    predicted = classifier.predict(test)
    confusion = (test_labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)
    commonest = train_labels.bincount(minlength=classes).argmax()
    return FrameProbeResult(
        accuracy=confusion.diagonal().sum().item() / len(test_labels),
        majority=(test_labels == commonest).double().mean().item(),
        confusion=confusion,
    )


def summary_of_frames(frames: Tensor, how: Summary = "mean") -> Tensor:
    """Summarise an utterance's frames [L, D] as one vector [D], for example to classify speakers: the mean or the last.

    Raises:
        ValueError: no frames, or an unknown ``how``.
    """
    if len(frames) == 0:
        raise ValueError("frames: expected at least one")
    if how == "mean":
        return frames.mean(0)
    if how == "last":
        return frames[-1]
    raise ValueError(f"how: expected one of {', '.join(get_args(Summary))}, got {how!r}")


def sequence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the CTC loss (connectionist temporal classification) of utterances' sequences of phones.

    As in CPC_audio, the target is the sequence of frame labels without repetitions, and each utterance's loss is
    divided by the length of its target before the mean is taken.

    Args:
        logits: [B, L, classes + 1], the blank last.
        labels: int64 [B, L] in 0..classes-1.
    """
    new = torch.ones_like(labels, dtype=torch.bool)
    new[:, 1:] = labels[:, 1:] != labels[:, :-1]
    frames = torch.full_like(labels[:, 0], labels.shape[1])
    blank = logits.shape[2] - 1
    steps = logits.log_softmax(2).transpose(0, 1)
    return F.ctc_loss(steps, labels[new], frames, new.sum(1), blank=blank, zero_infinity=True)


def _check_frames(name: str, features: Tensor, labels: Tensor, classes: int) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"{name}_features: expected [F, D] and as many labels, got {list(features.shape)} and {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name}_labels: expected 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    check_finite(f"{name}_features", features)


def _groups(frames: int, how: _Recipe, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return where each group of frames that stay together begins, and its number of frames, int64 [G] each."""
    if how.group:
        starts = torch.arange(0, frames, how.group)
        return starts, (frames - starts).clamp(max=how.group)
    if lengths is None or sum(lengths) != frames:
        raise ValueError(f"train_lengths: expected the utterances' frames, {frames} in all")
    counts = torch.tensor([length for length in lengths if length])
    return counts.cumsum(0) - counts, counts


def _frames_in(starts: Tensor, counts: Tensor) -> Tensor:
    """Return the indices of all frames of some groups."""
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (starts - before).repeat_interleave(counts)


def _trained(
    features: Tensor, labels: Tensor, groups: tuple[Tensor, Tensor], how: _Recipe, classes: int, hidden: int, seed: int
) -> FrameClassifier:
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        classifier = FrameClassifier(features.shape[1], classes, hidden=hidden)
        if how.xavier:
            for layer in classifier.layers:
                nn.init.xavier_normal_(layer.weight)
    starts, counts = groups
    optimizer = torch.optim.Adam(classifier.parameters(), how.learning_rate, eps=how.epsilon)
    steps_of_epoch = -(-len(starts) // how.groups)
    epochs = max(how.epochs, -(-how.least_steps // steps_of_epoch))
    steps = epochs * steps_of_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if how.decayed else 1.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(starts), generator=generator).split(how.groups):
            frames = _frames_in(starts[batch], counts[batch])
            optimizer.zero_grad()
            classifier.loss(features[frames], labels[frames]).backward()
            optimizer.step()
            scheduler.step()
    return classifier
