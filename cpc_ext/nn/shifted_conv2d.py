"""The convolutions of PixelCNN++: shifted so that an output sees no later pixel, with normalised weights.

Features [B, C, H, W] give [B, O, H, W], or half or twice the size. A shifted kernel covers a rectangle above, or above
and to the left of, the output's pixel, which it includes. At stride 1 a masked convolution computes it, whose kernel
also adds bias and skip connection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.nn.fixed_mask import FixedMask
from cpc_ext.nn.typed import Module
from cpc_ext.ops.masked_conv2d import masked_conv2d

__all__ = ["ChannelMix", "ShiftedConv2d", "ShiftedConvTranspose2d", "initialize_from_data"]

# Variance below which outputs count as constant.
_CONSTANT = 1e-8

Shift = Literal["down", "down-right"]


class _WeightNorm(Module, ABC):
    """A layer whose weight is weight_g * weight_v / |weight_v| (Salimans & Kingma 2016, arXiv 1602.07868).

    The norm is taken for each index of the weight's first dimension.

    Args:
        weight: initial weight.
        bias: initial bias.
        gain: standard deviation that :func:`initialize_from_data` gives the outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gain: float) -> None:
        super().__init__()
        assert bias is not None  # PyTorch's layers have one unless told otherwise.
        self.weight_v = nn.Parameter(weight.detach().clone())
        self.weight_g = nn.Parameter(self._norm().detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self._gain = gain
        self._initializing = False

    @property
    def weight(self) -> Tensor:
        """The effective weight, of the shape of ``weight_v``."""
        return self.weight_v * (self.weight_g / self._norm())

    def _norm(self) -> Tensor:
        dims = tuple(range(1, self.weight_v.ndim))
        norm: Tensor = torch.linalg.vector_norm(self.weight_v, dim=dims, keepdim=True)
        return norm

    @abstractmethod
    def _convolve(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
        """Return the layer's result with this weight and bias."""

    def _run(self, inputs: Sequence[Tensor], added: Tensor | None) -> Tensor:
        if self._initializing:
            self._initialize(inputs)
        return self._convolve(inputs, self.weight, self.bias, added)

    def _initialize(self, inputs: Sequence[Tensor]) -> None:
        """Set scale and bias so that each output channel has mean 0 and a standard deviation of ``gain``.

        A constant output, as in the first row of few pixels, is not scaled to that deviation.
        """
        outputs = self._convolve(inputs, self.weight_v / self._norm(), None, None)
        variance, mean = torch.var_mean(outputs.to(self.bias.dtype), dim=(0, 2, 3), correction=0)
        deviation = torch.where(variance > _CONSTANT, variance, 1.0).sqrt()
        scale = self._possible_scale(self._gain / deviation)
        self.weight_g.copy_(scale.view(-1, *[1] * (self.weight_g.ndim - 1)).expand_as(self.weight_g))
        self.bias.copy_(-mean * scale)

    def _possible_scale(self, scale: Tensor) -> Tensor:
        """Return what ``weight_g`` can give of scales [O] wanted by the output channels: [O], or [1] for all alike."""
        return scale


@contextmanager
def initialize_from_data(model: nn.Module) -> Iterator[None]:
    """Return a context in which layers set their scales and biases from their inputs, in the order in which they run.

    Data-dependent initialisation (Salimans & Kingma 2016, section 3): for the batch that the model is run on, the
    outputs of every layer get mean 0 and a standard deviation of the layer's gain.
    """
    layers = [module for module in model.modules() if isinstance(module, _WeightNorm)]
    for layer in layers:
        layer._initializing = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer._initializing = False


def _check_kernel(kernel_size: tuple[int, int], shift: str) -> None:
    if shift not in ("down", "down-right"):
        raise ValueError(f'shift must be "down" or "down-right", got {shift!r}')
    if shift == "down" and kernel_size[1] % 2 == 0:
        raise ValueError(f"a kernel shifted down must have an odd width, got {kernel_size}")


class ShiftedConv2d(FixedMask, _WeightNorm):
    """Convolution with zero padding whose kernel ends at the output's row and, if shifted right, at its column.

    Shifted down, tap (i, j) of a kh x kw kernel reads the pixel kh - 1 - i rows above and j - (kw - 1) / 2 columns to
    the right; shifted down and right, kw - 1 - j columns to the left.

    Args:
        in_channels: number C of input channels.
        out_channels: number O of output channels.
        kernel_size: (kh, kw); kw must be odd for "down".
        shift: "down" or "down-right".
        stride: 1, or 2 for half the size.
        gain: see :func:`initialize_from_data`.
    """

    visible: Tensor
    _mask_buffer = "visible"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        shift: Shift,
        *,
        stride: int = 1,
        gain: float = 1.0,
    ) -> None:
        _check_kernel(kernel_size, shift)
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        super().__init__(conv.weight, conv.bias, gain)
        self.kernel_size, self.shift, self.stride = kernel_size, shift, stride
        kh, kw = kernel_size
        # Padding, to the right and below, that makes a kernel centred at the output's pixel of this one.
        self._hidden = (0, kw - 1 if shift == "down-right" else 0, 0, kh - 1)
        self._register_mask()

    def _mask_values(self) -> Tensor:
        return F.pad(torch.ones(self.kernel_size, dtype=torch.bool), self._hidden)

    @property
    def taps(self) -> list[tuple[int, int]]:
        """Input positions of the taps in raster order: rows and columns relative to stride times the output's pixel."""
        kh, kw = self.kernel_size
        before = kw - 1 if self.shift == "down-right" else (kw - 1) // 2
        return [(i - kh + 1, j - before) for i in range(kh) for j in range(kw)]

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:
        """Convolve [B, C, H, W] → [B, O, H, W], or [B, O, H / 2, W / 2].

        added: tensor of the result's shape to add to it; only at stride 1.
        """
        return self._run([input], added)

    def _convolve(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
        (input,) = inputs
        if self.stride == 1:
            weight = F.pad(weight, self._hidden)
            return masked_conv2d(input, weight, bias, mask=self.visible, condition=added)
        (top, left), (_, right) = self.taps[0], self.taps[-1]
        return F.conv2d(F.pad(input, (-left, right, -top, 0)), weight, bias, stride=self.stride)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight_v.shape[:2]
        return f"{in_channels}, {out_channels}, kernel_size={self.kernel_size}, {self.shift}, stride={self.stride}"


class ShiftedConvTranspose2d(_WeightNorm):
    """The transpose of a :class:`ShiftedConv2d` of stride 2, which doubles the size.

    Weights are [C, O, 2, kw] and normalised for each input channel, as by PyTorch's weight norm. One scale per input
    channel cannot give every output channel its own deviation: :func:`initialize_from_data` uses the mean of the scales
    that they would need.

    Args:
        in_channels, out_channels, shift: as of :class:`ShiftedConv2d`.
        kernel_size: (2, 3) for "down", or (2, 2) for "down-right".
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], shift: Shift) -> None:
        _check_kernel(kernel_size, shift)
        if kernel_size != ((2, 3) if shift == "down" else (2, 2)):
            raise ValueError(f"kernel_size must be (2, 3) shifted down or (2, 2) down and right, got {kernel_size}")
        conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, stride=2)
        super().__init__(conv.weight, conv.bias, 1.0)
        self.shift = shift

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [B, C, H, W] → [B, O, 2H, 2W]."""
        return self._run([input], None)

    def _convolve(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
        (input,) = inputs
        sides = 1 if self.shift == "down" else 0
        return F.conv_transpose2d(input, weight, bias, stride=2, padding=(0, sides), output_padding=(0, sides))

    def _possible_scale(self, scale: Tensor) -> Tensor:
        return scale.mean(0, keepdim=True)

    def extra_repr(self) -> str:
        in_channels, out_channels, *kernel_size = self.weight_v.shape
        return f"{in_channels}, {out_channels}, kernel_size={tuple(kernel_size)}, {self.shift}"


class ChannelMix(FixedMask, _WeightNorm):
    """A matrix [O, C] applied at every pixel ("network in network"), to the channels of one or more features.

    Args:
        in_channels: number C of channels of all features together.
        out_channels: number O of output channels.
        sources: number of features, all with the same number of channels. Their channels consist of two halves, as
            those of a concatenated ELU; in the matrix the first halves of all features precede the second ones.
    """

    visible: Tensor
    _mask_buffer = "visible"

    def __init__(self, in_channels: int, out_channels: int, *, sources: int = 1) -> None:
        linear = nn.Linear(in_channels, out_channels)
        super().__init__(linear.weight, linear.bias, 1.0)
        self.sources = sources
        self._register_mask()

    def _mask_values(self) -> Tensor:
        return torch.ones(1, 1, dtype=torch.bool)

    def of_sources(self, weight: Tensor) -> list[Tensor]:
        """Return the parts of a matrix [O, C] that multiply each of the features, [O, C / sources] each."""
        if self.sources == 1:
            return [weight]
        return [part.flatten(1) for part in torch.unflatten(weight, 1, (2, self.sources, -1)).unbind(2)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply the matrix to features [B, C / sources, H, W] → [B, O, H, W]."""
        return self._run(inputs, None)

    def _convolve(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
        (first, matrix), *others = zip(inputs, self.of_sources(weight), strict=True)
        output = masked_conv2d(first, matrix[..., None, None], bias, mask=self.visible, condition=added)
        for input, part in others:
            output = masked_conv2d(input, part[..., None, None], mask=self.visible, condition=output)
        return output

    def extra_repr(self) -> str:
        return f"{self.weight_v.shape[1]}, {self.weight_v.shape[0]}, sources={self.sources}"
