"""The optimizers of a run: Adam, AdamW, SGD with momentum, and LARS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cpc_ext.training.config import OptimizationSection

__all__ = ["LARS", "buffers_per_parameter", "optimizer_of"]


def optimizer_of(
    parameters: Sequence[torch.nn.Parameter], options: OptimizationSection, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer that the options ask for.

    Fused optimizers skip overflowed fp16 steps on the device. LARS is never fused, and no optimizer is on devices other
    than the CPU and CUDA; with those, PyTorch's GradScaler waits for the device in every fp16 step to read on the host
    whether it overflowed.
    """
    fused = device.type in ("cpu", "cuda")
    if options.optimizer == "lars":
        return LARS(parameters, options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    if options.optimizer == "sgd":
        sgd = torch.optim.SGD(
            parameters, options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=fused
        )
        if options.momentum:
            # If the first fp16 step overflows, PyTorch would leave the momentum buffers uninitialised.
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if options.weight_decay:
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    return torch.optim.Adam(parameters, lr=options.lr, fused=fused)


def buffers_per_parameter(options: OptimizationSection) -> int:
    """Return how many tensors of a parameter's size the optimizer keeps: Adam's two moments, or a momentum."""
    if options.optimizer == "adam":
        return 2
    return 0 if options.optimizer == "sgd" and not options.momentum else 1


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888, algorithm 1), with which SimCLR is trained.

    A weight w with gradient g is updated by ``v ← m v + η |w| / (|g| + β |w|) · (g + β w)`` and ``w ← w - lr v``. The
    norm of a layer's step is thus proportional to the norm of its weights, which allows large learning rates for large
    batches. Parameters with fewer than two dimensions (biases, scales of norms) get plain SGD with momentum and no
    weight decay, as in SimCLR. If a weight or its gradient is zero, ``η |w| / (|g| + β |w|)`` is replaced by 1.

    Args:
        params: as for any optimizer.
        lr: learning rate of all layers.
        momentum: m.
        weight_decay: β.
        trust: η, the norm of a layer's step relative to the norm of its weights, at a learning rate of 1.
    """

    def __init__(
        self, params: Any, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. closure: recomputes the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.ndim > 1:
            decay = group["weight_decay"]
            length, slope = parameter.norm(), gradient.norm()
            factor = group["trust"] * length / (slope + decay * length)
            factor = torch.where((length > 0) & (slope > 0), factor, torch.ones_like(factor))
            gradient = factor * gradient.add(parameter, alpha=decay)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])
