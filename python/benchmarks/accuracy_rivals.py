"""Training loops of ``accuracy_run.py``'s rivals: lightly's SimCLR by its own recipe, and supervised learning.

Both train an encoder of ours on channels-last images, in bfloat16 if the processor has instructions for it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.data import Dataset, ImageFetcher
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.training.machine import default_precision
from cpc_ext.training.precision import autocast

CPU = torch.device("cpu")

# Batch size, its learning rate, momentum, weight decay and temperature of lightly's CIFAR-10 benchmark, from
# docs/source/getting_started/benchmarks/cifar10_benchmark.py in its repository.
BATCH, LR, MOMENTUM, DECAY, TEMPERATURE = 128, 0.06, 0.9, 5e-4, 0.5
# Steps before the clock starts, and steps that are timed to find out how many fit into the given time.
UNTIMED, TIMED = 2, 4


def lightly_simclr(
    task: EncoderTask,
    dataset: Dataset,
    data_dir: Path,
    minutes: float,
    seed: int,
    look: Callable[[], float],
    *,
    probes: int,
) -> dict[str, Any]:
    """Train the task's encoder with lightly's views, head and loss, on the images in data_dir/train.

    This process, which has one core, also decodes images and makes views; pixels are normalised as in the task.

    look: returns the encoder's current accuracy; called ``probes`` times.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torchvision.datasets import ImageFolder

    torch.manual_seed(seed)
    encoder = task.model.encoder
    normalize = {"mean": list(dataset.mean), "std": list(dataset.std)}
    views = SimCLRTransform(input_size=dataset.image_shape[1], gaussian_blur=0.0, normalize=normalize)
    images = ImageFolder(str(data_dir / "train"), views)
    loader = torch.utils.data.DataLoader(images, batch_size=min(BATCH, len(images)), shuffle=True, drop_last=True)
    channels = encoder.out_channels
    head = SimCLRProjectionHead(channels, channels, 128)
    criterion = NTXentLoss(temperature=TEMPERATURE)
    parameters = [*encoder.parameters(), *head.parameters()]
    start = copy.deepcopy((encoder.state_dict(), head.state_dict()))

    def new_optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    def step(views: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        both = torch.cat(views).contiguous(memory_format=torch.channels_last)
        with autocast(CPU, default_precision("cpu")):
            features = encoder(both[:, None, None]).flatten(1)
            first, second = head(features).float().chunk(2)
        loss = criterion(first, second)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    batches = _endless(loader)
    encoder.train()
    optimizer = new_optimizer()
    for _ in range(UNTIMED):
        step(next(batches), optimizer)
    started = time.perf_counter()
    for _ in range(TIMED):
        step(next(batches), optimizer)
    total = max(1, int(60 * minutes / ((time.perf_counter() - started) / TIMED)))

    encoder.load_state_dict(start[0])
    head.load_state_dict(start[1])
    optimizer = new_optimizer()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    curve, spent = [[0.0, look()]], 0.0
    batches = _endless(loader)
    started = time.perf_counter()
    for number in range(1, total + 1):
        step(next(batches), optimizer)
        schedule.step()
        if number % -(-total // probes) == 0 or number == total:
            spent += time.perf_counter() - started
            curve.append([spent / 60, look()])
            started = time.perf_counter()
    return {
        "curve": curve,
        "steps": total,
        "images_per_second": total * loader.batch_size / spent,
        "training_seconds": spent,
        "encoder_parameters": sum(each.numel() for each in encoder.parameters()),
    }


def _endless(loader: Any) -> Iterator[list[Tensor]]:
    while True:
        for views, *_ in loader:
            yield views


# Share of the labelled images used for training; the rest decides when to stop.
LABELLED_SHARE = 0.9
# The learning rate is halved after so many epochs without improvement (PATIENCE); training ends after so many halvings.
PATIENCE, HALVINGS = 3, 4


def supervised(task: EncoderTask, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Train the task's encoder and a linear classifier on all labels until the held-out accuracy stops improving.

    "supervised" in the result is the classifier's test accuracy, not that of a probe of frozen features.
    """
    train, test = dataset.train, dataset.test
    assert train is not None
    assert test is not None
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    kept, held_out = order.split([int(LABELLED_SHARE * len(train)), len(train) - int(LABELLED_SHARE * len(train))])
    classifier = nn.Linear(task.model.encoder.out_channels, len(dataset.classes))
    parameters = [*task.model.encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=PATIENCE - 1)
    best, best_state, started, passes = 0.0, None, time.perf_counter(), 0
    while optimizer.param_groups[0]["lr"] > 2e-3 * 0.5**HALVINGS:
        task.model.train()
        fetch = ImageFetcher(train, CPU)
        for batch in kept[torch.randperm(len(kept), generator=generator)].split(128):
            with autocast(CPU, task.config.compute.precision):
                logits = classifier(task.encode(task.model, fetch(batch.numpy()), generator).mean((2, 3)))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(train.known_labels[batch.numpy()]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        passes += 1
        found = _told(task, classifier, train, held_out)
        schedule.step(found)
        if found > best:
            best = found
            best_state = copy.deepcopy((task.model.state_dict(), classifier.state_dict()))
    assert best_state is not None
    task.model.load_state_dict(best_state[0])
    classifier.load_state_dict(best_state[1])
    return {
        "supervised": _told(task, classifier, test, torch.arange(len(test))),
        "passes": passes,
        "training_seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def _told(task: EncoderTask, classifier: nn.Module, images: Any, chosen: Tensor) -> float:
    """Return the classifier's accuracy on the chosen images."""
    fetch = ImageFetcher(images, CPU, resident=False)
    right = 0
    for batch in chosen.split(500):
        logits = classifier(task.features(task.model, fetch(batch.numpy())))
        right += int((logits.argmax(1) == torch.from_numpy(images.known_labels[batch.numpy()])).sum())
    return right / len(chosen)
