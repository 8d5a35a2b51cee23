"""Base class of losses of images and their texts: open_clip's interface, and the exchange between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from cpc_ext.nn.across_ranks import Exchange, exchange_with
from cpc_ext.nn.typed import Module
from cpc_ext.ops._checks import check_floating
from cpc_ext.ops._contrast_arguments import check_number
from cpc_ext.ops._library import without_autocast

__all__ = ["ImageTextLoss"]


class ImageTextLoss(Module):
    """Base class of losses of image-text pairs; subclasses define ``_loss``.

    Args:
        rank, world_size: those of the default process group. With a world_size of 1 the process's own pairs are
            contrasted, even where there is a group.
        gather_negatives: one of ``exchanges``; replaces both, which then come from the process group.
        exchanges: the values of gather_negatives that the subclass supports.

    Raises:
        ValueError: an argument with another value.
    """

    def __init__(self, rank: int, world_size: int, gather_negatives: str | None, exchanges: Sequence[str]) -> None:
        super().__init__()
        if gather_negatives is not None:
            if gather_negatives not in exchanges:
                raise ValueError(f"gather_negatives must be one of {', '.join(exchanges)}, got {gather_negatives!r}")
            if world_size != 1:
                raise ValueError(f"gather_negatives asks the process group for its size, got world_size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be below world_size {world_size}, got {rank}")
        self.rank = rank
        self.world_size = world_size
        self.gather_negatives = gather_negatives

    if TYPE_CHECKING:

        @overload  # type: ignore[override]
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: float | Tensor,
            logit_bias: float | Tensor | None = None,
            output_dict: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: float | Tensor,
            logit_bias: float | Tensor | None = None,
            *,
            output_dict: Literal[True],
        ) -> dict[str, Tensor]: ...

        def __call__(self, *args: Any, **options: Any) -> Any: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss, a scalar in float32, or float64 for float64 inputs.

        Args:
            image_features, text_features: floating [B, D], usually of length 1; row n of both is of pair n.
            logit_scale: inverse temperature, a number or a tensor of one value; the exponential of a learnt parameter.
            logit_bias: added to all logits, a number or a tensor of one value. None: 0.
            output_dict: whether to return the loss as the value of "contrastive_loss" in a dict.

        Raises:
            TypeError, ValueError: features of other dtypes or shapes, a scale or bias that is not one finite number.
        """
        images, texts = image_features, text_features
        for name, features in (("image_features", images), ("text_features", texts)):
            check_floating(name, features)
        if images.ndim != 2 or images.shape != texts.shape or images.shape[0] == 0:
            raise ValueError(
                "image_features and text_features must both be [B, D], "
                f"got {tuple(images.shape)} and {tuple(texts.shape)}"
            )
        scale = _one_value("logit_scale", logit_scale)
        bias = None if logit_bias is None else _one_value("logit_bias", logit_bias)
        # Autocast would round features in float32.
        with without_autocast(images.device):
            loss = self._loss(images, texts, scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
        raise NotImplementedError

    def _exchange(self) -> Exchange:
        if self.gather_negatives is not None or self.world_size == 1:
            return exchange_with(self.gather_negatives or "none")
        exchange = exchange_with("gather")
        if (exchange.first, exchange.world) != (self.rank, self.world_size):
            raise ValueError(
                f"rank and world_size must be the process group's {exchange.first} and {exchange.world}, "
                f"got {self.rank} and {self.world_size}"
            )
        return exchange

    def extra_repr(self) -> str:
        if self.gather_negatives is not None:
            return f"gather_negatives={self.gather_negatives}"
        return "" if self.world_size == 1 else f"rank={self.rank}, world_size={self.world_size}"


def _one_value(name: str, value: float | Tensor) -> float | Tensor:
    """Return a number, or a tensor of one value, which open_clip's models may give, reshaped to no dimensions."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one value, got shape {tuple(value.shape)}")
        value = value.reshape(())
    check_number(name, value)
    return value
