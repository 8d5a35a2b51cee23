"""InfoNCE as a module: queries [*, M, D] and keys [*, N, D] to a scalar loss and an accuracy."""

from __future__ import annotations

from torch import Tensor

from cpc_ext.nn.typed import Module
from cpc_ext.ops.info_nce import InfoNCEOutput, info_nce

__all__ = ["InfoNCELoss"]


class InfoNCELoss(Module):
    """InfoNCE with a fixed temperature; see :func:`cpc_ext.ops.info_nce`.

    Args:
        temperature: positive divisor of the dot products.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, temperature: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.reduction = reduction

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        targets: Tensor | None = None,
        *,
        negatives: Tensor | None = None,
        weights: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> InfoNCEOutput:
        """Arguments and result as of :func:`cpc_ext.ops.info_nce`."""
        return info_nce(
            queries,
            keys,
            targets,
            negatives=negatives,
            scale=1 / self.temperature,
            weights=weights,
            exclude=exclude,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction}"
