"""Training of an encoder with labels, from the weights that it learnt without labels or from initial weights.

A linear classifier takes the encodings' mean over the patches, and both learn by cross-entropy from the run's random
crops and flips. Fine-tuning and the supervised baseline differ only in the weights that they start from and in the
encoder's learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.data import EpochSampler, ImageFetcher, ImageSet
from cpc_ext.data.spread import spread
from cpc_ext.measures.probe import encode, mean_and_deviation
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.nn.typed import Module
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.training.precision import autocast, grad_scaler
from cpc_ext.training.schedule import learning_rate

__all__ = ["FineTuning", "fine_tune"]

_BATCH = 32
_WARMUP = 0.1
_WEIGHT_DECAY = 1e-4
_CLIP_GRAD = 1.0
# Number of images from which the mean and deviation for standardising features are computed.
_STATISTICS_IMAGES = 500


@dataclass(frozen=True)
class FineTuning:
    """Length and learning rates of fine-tuning; the rates follow a cosine to zero.

    epochs: passes over the labelled images. min_steps: minimum number of updates, however few the images.
    encoder_lr, head_lr: peak learning rates of AdamW.
    """

    epochs: int
    min_steps: int
    encoder_lr: float
    head_lr: float

    def steps(self, images: int) -> int:
        """Return the number of updates for so many labelled images, in batches of at most 32."""
        return max(self.min_steps, self.epochs * -(-images // _BATCH))


class _Classifier(Module):
    """Encoder and linear classifier: uint8 images [B, C, H, W] → logits [B, classes], which start equal.

    mean, deviation: [D], by which features are standardised.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, task: EncoderTask, model: EncoderModel, mean: Tensor, deviation: Tensor, classes: int, precision: str
    ) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self._task = task
        self._precision = precision

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with autocast(images.device, self._precision):
            encodings = self._task.encode(self.model, images, generator)
        logits: Tensor = self.head((encodings.float().mean((2, 3)) - self.mean) / self.deviation)
        return logits


def fine_tune(
    task: EncoderTask,
    model: EncoderModel,
    images: ImageSet,
    chosen: np.ndarray,
    test: ImageSet,
    recipe: FineTuning,
    *,
    classes: int,
    precision: str,
    seed: int,
    progress: Callable[[range], Iterable[int]],
) -> Tensor:
    """Train a model of this task, in place, together with a linear classifier.

    Args:
        task: task that crops and encodes images.
        model: a model of the task.
        images: labelled images.
        chosen: indices of the images to learn from.
        test: images to classify afterwards.
        recipe: how long and how fast to learn.
        classes: number of classes.
        precision: precision of convolutions and matrix products.
        seed: determines order, crops and flips.
        progress: wraps the range of updates, as tqdm does.

    Returns:
        Logits of the test images, float32 [N, classes] on the CPU.
    """
    device = next(model.parameters()).device
    task.thaw(model)
    mean, deviation = _statistics(task, model, images, chosen, device)
    classifier = _Classifier(task, model, mean, deviation, classes, precision).to(device).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.parameters()), "peak": recipe.encoder_lr},
            {"params": list(classifier.head.parameters()), "peak": recipe.head_lr},
        ],
        weight_decay=_WEIGHT_DECAY,
    )
    scaler = grad_scaler(device, precision)
    fetch = ImageFetcher(images, device)
    crops = torch.Generator().manual_seed(seed)
    total = recipe.steps(len(chosen))
    batches = _batches(chosen, seed)
    for step in progress(range(1, total + 1)):
        _set_learning_rates(optimizer, step, total)
        batch = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(fetch(batch), crops), fetch.known_labels(batch))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(classifier.parameters(), _CLIP_GRAD)
        scaler.step(optimizer)
        scaler.update()
    classifier.eval()
    return encode(test, classifier, device)


def _statistics(
    task: EncoderTask, model: EncoderModel, images: ImageSet, chosen: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the features, [D] each, before the model learns."""
    some = chosen[spread(_STATISTICS_IMAGES, len(chosen))]
    features = encode(ImageSet(images=images.images[some]), lambda batch: task.features(model, batch), device)
    return mean_and_deviation(features)


def _batches(chosen: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of the chosen indices, epoch after epoch; none of a single image if there are more."""
    sampler = EpochSampler(len(chosen), min(_BATCH, len(chosen)), seed=seed, drop_last=False)
    while True:
        *batches, last = sampler
        if batches and len(last) == 1:
            # Batch norm of a map of one pixel does not take a single image.
            batches[-1], last = np.split(np.concatenate([batches[-1], last]), [-2])
        for batch in (*batches, last):
            yield chosen[batch]


def _set_learning_rates(optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
    """Set the learning rate of every group at a step out of ``total``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(
            step, peak=group["peak"], total_steps=total, warmup_steps=round(_WARMUP * total), schedule="cosine"
        )
