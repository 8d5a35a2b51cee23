"""The gated PixelCNN of pytorch-generative, for images with binary values: logits of the values, and sampling.

Unlike in :class:`~cpc_ext.models.GatedPixelCNN`, convolutions are factored into rows and columns, as the paper
suggests, every layer has a skip connection to the head, and all colours of a pixel are predicted at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.nn.typed import Module, ModuleList, Sequential

__all__ = ["BinaryGatedPixelCNN"]

_FIRST_KERNEL, _KERNEL = 7, 3


class BinaryGatedPixelCNN(Module):
    """Gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328) with skip connections, in PyTorch's own convolutions.

    A layer has a vertical stack, whose features for the horizontal one see the rows strictly above, and a horizontal
    stack, which sees the pixels to the left and, except in the first layer, the pixel itself. The head takes the sum of
    the layers' skip outputs. The class serves to evaluate and sample models that pytorch-generative has trained; for
    images of 256 values, and fast sampling, take :class:`~cpc_ext.models.GatedPixelCNN`.

    Args:
        in_channels: C.
        out_channels: logits of a pixel; :meth:`nats` and :meth:`sample` need C of them.
        layers: number of gated layers after the first.
        channels: channels of each stack.
        head_channels: channels between the two layers of the head.

    Raises:
        ValueError: ``layers`` below 0, or another argument below 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        layers: int = 10,
        channels: int = 128,
        head_channels: int = 32,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "channels": channels}
        for name, value in (sizes | {"head_channels": head_channels}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if layers < 0:
            raise ValueError(f"layers must be at least 0, got {layers}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.first = _GatedLayer(in_channels, channels, _FIRST_KERNEL, first=True)
        self.layers = ModuleList(_GatedLayer(channels, channels, _KERNEL, first=False) for _ in range(layers))
        self.head = Sequential(
            nn.ReLU(), nn.Conv2d(channels, head_channels, 1), nn.ReLU(), nn.Conv2d(head_channels, out_channels, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of every pixel given those before it: [B, C, H, W] of 0 and 1 → [B, out_channels, H, W].

        ValueError for another shape.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be [B, {self.in_channels}, H, W], got {tuple(images.shape)}")
        images = images.to(next(self.parameters()).dtype)
        vertical, horizontal, total = self.first(images, images)
        for layer in self.layers:
            vertical, horizontal, skip = layer(vertical, horizontal)
            total = total + skip
        return self.head(total)

    def nats(self, images: Tensor) -> Tensor:
        """Return the negative log-likelihood of each image in nats, [B], float32 (float64 for a float64 model).

        images: [B, C, H, W] of 0 and 1, or of values in between, which weigh the losses of both.

        ValueError for another shape, values out of 0..1, or a model whose outputs are not C.
        """
        self._check_outputs()
        if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(f"images must hold values in 0..1, got {images.min().item():g}..{images.max().item():g}")
        logits = _precise(self(images))
        losses = F.binary_cross_entropy_with_logits(logits, images.to(logits.dtype), reduction="none")
        return losses.flatten(1).sum(1)

    @torch.no_grad()
    def sample(self, count: int, size: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, [count, C, size, size] of 0 and 1, uint8. The whole network runs for every pixel.

        generator: on the model's device. ValueError for a count or size below 0, or a model whose outputs are not C.
        """
        self._check_outputs()
        if count < 0 or size < 0:
            raise ValueError(f"count and size must be at least 0, got {count} and {size}")
        images = torch.zeros(count, self.in_channels, size, size, device=next(self.parameters()).device)
        for row in range(size):
            for column in range(size):
                # Rows further down have no influence.
                chances = _precise(self(images[:, :, : row + 1])[:, :, row, column]).sigmoid()
                images[:, :, row, column] = torch.bernoulli(chances, generator=generator).to(images.dtype)
        return images.to(torch.uint8)

    def _check_outputs(self) -> None:
        if self.out_channels != self.in_channels:
            raise ValueError(
                f"a model of {self.out_channels} logits a pixel of {self.in_channels} colours is not of binary images"
            )


class _GatedLayer(Module):
    """A layer of both stacks, [B, in, H, W] each; returns vertical and horizontal features, and the skip output."""

    def __init__(self, in_channels: int, channels: int, kernel: int, *, first: bool) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.first = first
        above = self.reach + 1
        self.vertical_rows = nn.Conv2d(in_channels, channels, (1, kernel), padding=(0, self.reach))
        self.vertical_columns = nn.Conv2d(channels, 2 * channels, (above, 1))
        self.vertical_own = nn.Conv2d(in_channels, 2 * channels, 1)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal = nn.Conv2d(in_channels, 2 * channels, (1, above))
        self.output = nn.Conv2d(channels, channels, 1)
        self.skip = nn.Conv2d(channels, channels, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.vertical_rows(vertical)
        # Zeros on top and the last row left out, so that each position sees the rows strictly above it.
        above = self.vertical_columns(F.pad(rows, (0, 0, self.reach + 1, 0))[:, :, :-1])
        left = F.pad(horizontal, (self.reach + self.first, 0, 0, 0))
        left = left[..., : left.shape[3] - self.first]
        gated = _gated(self.link(above) + self.horizontal(left))
        output = self.output(gated)
        if not self.first:
            output = output + horizontal
        return _gated(above + self.vertical_own(vertical)), output, self.skip(gated)


def _precise(logits: Tensor) -> Tensor:
    """Return logits in at least float32, as bfloat16 would round a probability of 0.999 to 1."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _gated(features: Tensor) -> Tensor:
    """Return tanh of one half of the channels times sigmoid of the other."""
    value, gate = features.chunk(2, 1)
    return value.tanh() * gate.sigmoid()
