"""A part of a model that learns by a loss of its own: its backward pass, optimizer, loss scaling and gradient norm.

Most models are one such part. Where there are several, none of these is shared, so that what one part does in a step
depends on the others by nothing but the features it gets.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cpc_ext.training.config import RunConfig
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.meter import FiniteGuard
from cpc_ext.training.optimizers import optimizer_of
from cpc_ext.training.precision import autocast, grad_scaler
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Handover

__all__ = ["Learner"]

# A loss scale that no gradients need: those that still overflow are not finite themselves.
_LEAST_SCALE = 2.0**-16


class Learner:
    """One part of a task, see :meth:`cpc_ext.training.task.Task.parts`.

    Attributes:
        index: its place among the parts.
        part: the module, without what wraps it for several processes.
        parameters: those that it trains.
    """

    def __init__(self, index: int, part: nn.Module, config: RunConfig, ranks: Ranks) -> None:
        options, device = config.optimization, ranks.device
        self.index = index
        self.part = part
        self.parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        self._config = config
        self._ranks = ranks
        self._optimizer = optimizer_of(self.parameters, options, device)
        self._scaler = grad_scaler(device, config.compute.precision)
        self._run: nn.Module = part
        if ranks.share.world_size > 1:
            # Buffers are masks, and the running statistics of batch norm, which nothing in training reads.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            unshared: dict[str, Any] = {name: False}
            self._run = DistributedDataParallel(part, **unshared)

    def update(
        self,
        step: int,
        given: Handover,
        labels: Tensor | None,
        streams: RandomStreams,
        *,
        learning_rate: float,
        guard: FiniteGuard,
    ) -> tuple[dict[str, Tensor], Handover]:
        """Forward, backward, and an update of the parameters.

        Nothing here waits for the device, but in fp16 for an optimizer that is not fused, see :func:`optimizer_of`.

        Returns the step's scalars, means over the processes that share the batch, and what the next part gets.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._ranks.device, self._config.compute.precision):
            values, handed = self._run(given, labels, streams)
        self._scaler.scale(values["loss"]).backward()
        values = self._ranks.mean(values)
        self._scaler.unscale_(self._optimizer)
        norm = get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        limit = self._config.optimization.clip_grad
        if limit is not None:
            clip_grads_with_norm_(self.parameters, limit, norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # Loss scaling finds its factor by overflowing now and then; such gradients are expected and not applied.
        guard.watch(step, values["loss"], *([] if self._scaler.is_enabled() else [norm]))
        return {**values, "grad_norm": norm}, handed

    @property
    def diverged(self) -> bool:
        """Whether loss scaling has found no factor that gradients do not overflow with; waits for the device."""
        return self._scaler.is_enabled() and self._scaler.get_scale() < _LEAST_SCALE

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. An exception, of nearly any type, where it is not of this part."""
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            # Those of this run, on this device.
            group.update(self._optimizer.defaults)
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                expected = torch.Size() if name == "step" else parameter.shape
                if value.shape != expected:
                    raise ValueError(f"optimizer: expected {name} {list(expected)}, got {list(value.shape)}")
        if any(type(value) not in (int, float) for value in state["scaler"].values()):
            raise TypeError("scaler: expected numbers")
        self._scaler.load_state_dict(state["scaler"])
