"""What updates the weights of a run: Adam, SGD with momentum, and LARS, as the options name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cpc_ext.training.config import OptimizationSection

__all__ = ["LARS", "optimizer_of"]


def optimizer_of(
    parameters: Sequence[torch.nn.Parameter], options: OptimizationSection, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that the options ask for.

    Fused ones skip overflowed steps of fp16 on the device. LARS is not fused, nor is any on devices other than CPUs and
    CUDA's: with these PyTorch's GradScaler reads on the host in every step of fp16 whether it overflowed, and so waits.
    """
    fused = device.type in ("cpu", "cuda")
    if options.optimizer == "lars":
        return LARS(parameters, options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    if options.optimizer == "sgd":
        sgd = torch.optim.SGD(
            parameters, options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=fused
        )
        if options.momentum:
            # PyTorch leaves what is in memory as the first velocity where the first step overflows in fp16.
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if options.weight_decay:
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    return torch.optim.Adam(parameters, lr=options.lr, fused=fused)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888, algorithm 1), by which SimCLR is trained.

    A weight w with gradient g moves by ``v ← m v + η |w| / (|g| + β |w|) · (g + β w)`` and ``w ← w - lr v``, so that
    large batches can have large rates: the length of a layer's step follows that of its weights. Biases and the scales
    of norms, all that has fewer than two dimensions, move by momentum alone and do not decay, as in SimCLR. Where a
    weight or its gradient is zero the factor is 1.

    Args:
        params: as of any optimizer.
        lr: of all layers.
        momentum: m.
        weight_decay: β.
        trust: η, the length of a layer's step in units of that of its weights, at a rate of 1.
    """

    def __init__(
        self, params: Any, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. closure: computes the loss again, which is returned."""
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
