"""InfoNCE as a module: queries [*, M, D] and keys [*, N, D] give a loss, an accuracy and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cpc_ext.nn.typed import Module
from cpc_ext.ops._contrast_arguments import check_positive
from cpc_ext.ops.info_nce import InfoNCEOutput, info_nce

__all__ = ["InfoNCELoss"]


class InfoNCELoss(Module):
    """InfoNCE at a temperature, fixed or learnt; see :func:`cpc_ext.ops.info_nce`.

    Args:
        temperature: positive divisor of the dot products; the initial one if it is learnt.
        reduction: "mean", "sum" or "none".
        learnable: whether the temperature is learnt, as in CLIP: by the log of its inverse, ``log_scale``.
        max_scale: upper bound of the inverse of a learnt temperature. A call first clamps the parameter to it, as CLIP
            does.

    Raises:
        TypeError, ValueError: a temperature that is not a number, not positive, or lower than ``max_scale`` allows.
    """

    log_scale: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        reduction: str = "mean",
        learnable: bool = False,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        if learnable and not max_scale * temperature >= 1:
            raise ValueError(f"temperature must be at least 1 / max_scale = {1 / max_scale}, got {temperature}")
        self.temperature = temperature
        self.reduction = reduction
        self.max_scale = max_scale
        self.register_parameter("log_scale", nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        targets: Tensor | None = None,
        *,
        negatives: Tensor | None = None,
        weights: Tensor | None = None,
        exclude: Tensor | None = None,
        key_range: Tensor | None = None,
        key_bias: Tensor | None = None,
        groups: tuple[Tensor, Tensor] | None = None,
        contrast: str = "all",
        symmetric: bool = False,
    ) -> InfoNCEOutput:
        """Call :func:`cpc_ext.ops.info_nce`, with its arguments and result."""
        return info_nce(
            queries,
            keys,
            targets,
            negatives=negatives,
            scale=self.scale(),
            weights=weights,
            exclude=exclude,
            key_range=key_range,
            key_bias=key_bias,
            groups=groups,
            contrast=contrast,
            symmetric=symmetric,
            reduction=self.reduction,
        )

    def scale(self) -> float | Tensor:
        """Return the inverse temperature; if it is learnt, a tensor without dimensions, with a gradient."""
        if self.log_scale is None:
            return 1 / self.temperature
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        learnt = "" if self.log_scale is None else f", learnable=True, max_scale={self.max_scale}"
        return f"temperature={self.temperature}, reduction={self.reduction}{learnt}"
