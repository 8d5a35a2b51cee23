"""Time of the stages of a CPC training step: input, encoder, context, loss and optimizer, forward and backward.

In the forward pass, marks are set when the encoder, the context network and the objective return. In the backward pass,
autograd runs nodes in the reverse order of their creation: when the gradient of the contexts is complete, the loss is
done, and when that of the encodings is complete, the context network is done. Hooks on these two tensors set the marks.
Marks cover the whole step without gaps, so that the stages add up to it. On CUDA a mark is an event in the stream,
otherwise a reading of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpc_ext.models import CPC

__all__ = ["StageClock"]

STAGES = ("input", "encoder", "context", "loss", "optimizer")
# The marks of a step in order; each ends one pass of a stage. Clearing the gradients belongs to the optimizer.
MARKS = (
    ("optimizer", "update"),
    ("input", "forward"),
    ("encoder", "forward"),
    ("context", "forward"),
    ("loss", "forward"),
    ("loss", "backward"),
    ("context", "backward"),
    ("encoder", "backward"),
    ("optimizer", "update"),
)


class StageClock:
    """Times the stages of training steps of a model.

    model: its encoder, context and objective get permanent forward hooks.
    """

    def __init__(self, model: CPC, device: torch.device) -> None:
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []
        self._steps: list[dict[str, dict[str, float]]] = []
        for module in (model.encoder, model.context):
            module.register_forward_hook(self._mark_both_ways)
        model.objective.register_forward_hook(lambda *_: self._mark())

    def step(
        self, optimizer: torch.optim.Optimizer, make_input: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]
    ) -> None:
        """Run and time one training step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks = []
        self._mark()
        optimizer.zero_grad(set_to_none=True)
        self._mark()
        patches = make_input()
        self._mark()
        loss(patches).backward()
        self._mark()
        optimizer.step()
        self._mark()
        self._steps.append(self._passes())

    def medians(self) -> dict[str, dict[str, float]]:
        """Return the median seconds of each stage by pass: "forward", "backward", or "update" for the optimizer."""
        return {
            stage: {name: statistics.median(step[stage][name] for step in self._steps) for name in passes}
            for stage, passes in self._steps[0].items()
        }

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _mark_both_ways(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._mark()
        if output.requires_grad:
            output.register_hook(lambda grad: self._mark())

    def _passes(self) -> dict[str, dict[str, float]]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        passes: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
        for begin, end, (stage, name) in zip(self._marks[:-1], self._marks[1:], MARKS, strict=True):
            seconds = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            passes[stage][name] = passes[stage].get(name, 0.0) + seconds
        return passes
