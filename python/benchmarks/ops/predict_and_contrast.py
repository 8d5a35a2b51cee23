"""predict_and_contrast against the losses of two programs for speech as they write them, and against one call per step.

The work is the floating-point operations of the predictions, and twice as many for their gradients. Those of the
contrasts, 2 * (S + 1) / E times as many, are not included. Eager gathers as the programs do: Greedy InfoMax gathers
every position in its permutations, although a step uses only their last columns; CPC_audio gathers its negatives once,
and every step concatenates its positives.

The fair rival predicts one step after another, and contrasts each with ``info_nce``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark import Case, Op, Problem, both_passes
from torch import Tensor

from cpc_ext.ops import info_nce, predict_and_contrast

STEPS = 12
BY_STEP = "info_nce step by step"


@dataclass(frozen=True)
class SpeechCase(Case):
    """A batch of sequences of encodings, with positions in each from which the following encodings are predicted.

    permuted: negatives are taken from permutations of all encodings, with a window of positions in which steps end, as
        in Greedy InfoMax; else they are drawn for every position, and are the same in all steps, as in CPC_audio.
    """

    length: int
    places: int
    channels: int
    samples: int
    permuted: bool
    batch: int = 8

    @property
    def label(self) -> str:
        drawn = "permuted" if self.permuted else "shared"
        return f"{self.batch} x {self.places} of [{self.length},{self.channels}], {self.samples} {drawn}"

    @property
    def size(self) -> int:
        return self.batch * self.length


def prepare(case: SpeechCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    batch, length, places, channels = case.batch, case.length, case.places, case.channels
    keys = torch.randn(batch * length, channels, device=device).to(dtype)
    contexts = torch.randn(batch, places, channels, device=device).mul(channels**-0.25).to(dtype)
    weights = torch.randn(STEPS, channels, channels, device=device).mul(channels**-0.75).to(dtype)
    tensors = [tensor.requires_grad_(case.backward) for tensor in (contexts, weights, keys)]
    place, step = torch.arange(places, device=device), torch.arange(1, STEPS + 1, device=device).view(-1, 1, 1)
    first = torch.arange(batch, device=device).view(-1, 1) * length
    targets = first + place + step
    if case.permuted:
        permutations = torch.stack([torch.randperm(batch * length, device=device) for _ in range(case.samples)])
        counts = places - step
        columns = batch * (length - counts) + torch.arange(batch, device=device).view(-1, 1) * counts + place
        targets = torch.where(place < counts, targets, -1)
        negatives = permutations.T[columns.clamp(max=batch * length - 1)]
        eager = _greedy(targets, permutations)
    else:
        negatives = torch.randint(batch * length, (batch, places, case.samples), device=device)
        eager = _joined(targets, negatives)

    def run(loss: Callable[..., Tensor]) -> Tensor | tuple[Tensor, ...]:
        value = loss(*tensors)
        return torch.autograd.grad(value, tensors) if case.backward else value

    alternatives: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        BY_STEP: _step_by_step(targets, negatives),
        "ours": lambda *tensors: predict_and_contrast(*tensors, targets, negatives=negatives).loss,
    }
    rows = int((targets >= 0).sum())
    return Problem(
        {name: lambda loss=loss: run(loss) for name, loss in alternatives.items()},
        2 * rows * channels**2 * (3 if case.backward else 1),
        tolerance=2e-2 if case.dtype == "float32" else 5e-2,
    )


def _greedy(targets: Tensor, permutations: Tensor) -> Callable[..., Tensor]:
    """Return Greedy InfoMax's loss, in which a step uses the last columns of each permutation's gathered encodings."""

    def loss(contexts: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        drawn = keys[permutations]
        losses = []
        for matrix, positives in zip(weights, targets, strict=True):
            named = positives[positives >= 0]
            queries = contexts[positives >= 0] @ matrix.T
            best = (queries * keys[named]).sum(-1, keepdim=True)
            scores = torch.cat([best, torch.einsum("md,smd->ms", queries, drawn[:, -len(named) :])], 1)
            losses.append(F.cross_entropy(scores.float(), torch.zeros_like(named)))
        return torch.stack(losses).mean()

    return loss


def _joined(targets: Tensor, negatives: Tensor) -> Callable[..., Tensor]:
    """Return CPC_audio's loss, in which each step concatenates its positives with the negatives shared by all steps."""

    def loss(contexts: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        drawn = keys[negatives]
        losses = []
        for matrix, positives in zip(weights, targets, strict=True):
            candidates = torch.cat([keys[positives].unsqueeze(2), drawn], 2)
            scores = ((contexts @ matrix.T).unsqueeze(2) * candidates).sum(-1).flatten(0, 1)
            losses.append(F.cross_entropy(scores.float(), torch.zeros_like(positives.flatten())))
        return torch.stack(losses).mean()

    return loss


def _step_by_step(targets: Tensor, negatives: Tensor) -> Callable[..., Tensor]:
    """Return the loss with one call of ``info_nce`` for each step, each of which computes a gradient of the keys."""
    every = negatives if negatives.ndim == 4 else negatives.expand(STEPS, -1, -1, -1)

    def loss(contexts: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        losses = []
        for matrix, positives, drawn in zip(weights, targets, every, strict=True):
            rows = positives >= 0
            queries = contexts[rows] @ matrix.T
            losses.append(info_nce(queries, keys, positives[rows], negatives=drawn[rows]).loss)
        return torch.stack(losses).mean()

    return loss


# The sequence lengths of Greedy InfoMax's modules, of which a window of 128 positions predicts.
LENGTHS = (4095, 1023, 512, 257, 128)
CASES = (
    *(c for n in LENGTHS for c in both_passes(SpeechCase, n, 128, 512, 10, True, sweep=True, quick=n == 128)),
    *both_passes(SpeechCase, 128, 116, 256, 128, False),
    *both_passes(SpeechCase, 4095, 128, 512, 10, True, dtype="bfloat16"),
    *both_passes(SpeechCase, 128, 116, 256, 128, False, dtype="bfloat16"),
)

OPS = (Op("predict_and_contrast", "compute", "encodings of a batch, 12 steps", CASES, prepare, counted=False),)
