"""The training step of a part that learns by its own loss: backward pass, optimizer, loss scaling and gradient norm.

Most models have one part. Several parts share none of these, so that a part's step depends on the other parts only
through the features that it gets.
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

# If gradients still overflow below this loss scale, they are not finite themselves.
_LEAST_SCALE = 2.0**-16


class Learner:
    """Trains one part of a task, see :meth:`cpc_ext.training.task.Task.parts`.

    Attributes:
        index: index of the part.
        part: the module, without the wrapper for several processes.
        parameters: the parameters that are trained.
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
            # Buffers need no synchronisation: they are masks, and running statistics of batch norm that training does
            # not read.
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
        """Run forward and backward passes and update the parameters.

        Waits for the device only in fp16 with an optimizer that is not fused, see :func:`optimizer_of`.

        Returns:
            The step's scalars, averaged over the processes that share the batch, and the input of the next part.
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
        # With loss scaling, gradients overflow now and then by design and are not applied, so the norm is not watched.
        guard.watch(step, values["loss"], *([] if self._scaler.is_enabled() else [norm]))
        return {**values, "grad_norm": norm}, handed

    @property
    def diverged(self) -> bool:
        """True if gradients overflow even at the smallest useful loss scale; waits for the device."""
        return self._scaler.is_enabled() and self._scaler.get_scale() < _LEAST_SCALE

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``. Raises an exception, of nearly any type, if it is not a state of this part."""
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            # Keep this run's options, such as the weight decay, and those of this device, such as fused.
            group.update(self._optimizer.defaults)
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                expected = torch.Size() if name == "step" else parameter.shape
                if value.shape != expected:
                    raise ValueError(f"optimizer: expected {name} {list(expected)}, got {list(value.shape)}")
        if any(type(value) not in (int, float) for value in state["scaler"].values()):
            raise TypeError("scaler: expected numbers")
        self._scaler.load_state_dict(state["scaler"])
