"""Masked convolution as a layer, [B, C, H, W] to [B, O, H, W], with the PixelCNN family's masks by name.

The mask is fixed when the layer is made and never trained; :func:`cpc_ext.ops.masked_conv2d` computes the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpc_ext.nn.fixed_mask import FixedMask
from cpc_ext.ops.masked_conv2d import masked_conv2d

__all__ = ["MaskedConv2d"]

_MASKS = ("A", "B", "vertical", "horizontal")


class MaskedConv2d(FixedMask):
    """Convolution at stride 1 with zero padding and hidden taps.

    ============== ============================================ ===================================================
    mask           hidden taps                                  used by
    ============== ============================================ ===================================================
    "A"            the centre and all after it in raster order  first layer of a PixelCNN (arXiv 1601.06759)
    "B"            all after the centre in raster order         its other layers
    "vertical"     rows below the centre's; the whole of the    vertical stack of a gated PixelCNN (arXiv
                   centre's own row is visible                  1606.05328); context networks of CPC, for which
                                                                a 1 x n kernel sees its whole row
    "horizontal"   columns right of the centre's                horizontal stack of a gated PixelCNN
    a tensor       where it is 0 or False: [kh, kw] or
                   [out_channels, in_channels, kh, kw]
    ============== ============================================ ===================================================

    With ``color_groups=n`` the channels of masks "A" and "B" belong to n colours in order (the first ``channels / n``
    channels to the first), and at the centre an output sees the strictly earlier colours ("A") or also its own ("B").
    With a gate, the channels after the gate are divided like this, and both halves of a gate belong to its colour.
    The centre of a kernel of even side k is tap ``(k - 1) // 2``.

    Args:
        in_channels: number C of input channels.
        out_channels: number O of output channels; halved by ``activation="gated"``.
        kernel_size: side of the kernel, or (kh, kw).
        mask: a name from the table, or a tensor.
        color_groups: number of colours that the channels of masks "A" and "B" are divided into.
        dilation: distance of neighbouring taps in pixels.
        bias: whether to add a learned bias.
        activation: None, "relu" or "gated", as in :func:`cpc_ext.ops.masked_conv2d`.

    Weights and bias start as those of :class:`torch.nn.Conv2d`. The mask is a buffer outside of the state dict, whose
    values survive ``to_empty`` and are restored in layers made on the meta device. For changes of its values see
    :func:`cpc_ext.ops.masked_conv2d`.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        mask: str | Tensor,
        *,
        color_groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        kernel_size = height, width
        self.mask_name = mask if isinstance(mask, str) else "custom"
        self.dilation = dilation
        self.activation = activation
        self.color_groups = color_groups
        self._given_mask: Tensor | None = None
        if isinstance(mask, Tensor):
            if color_groups != 1:
                raise ValueError(f'color_groups needs mask "A" or "B", got {color_groups} with a tensor')
            shape = (out_channels, in_channels, *kernel_size)
            if tuple(mask.shape) not in (kernel_size, shape):
                raise ValueError(f"mask must have shape {kernel_size} or {shape}, got {tuple(mask.shape)}")
            if mask.is_meta:
                raise ValueError('mask must hold values, got one on the meta device: make it with device="cpu"')
            self._given_mask = mask.detach().to("cpu", copy=True)
        elif not isinstance(mask, str):
            raise TypeError(f"mask must be a tensor or one of {', '.join(_MASKS)}, got {type(mask).__name__}")
        # nn.Conv2d initialises the parameters (and checks the sizes).
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight = conv.weight
        self.bias = conv.bias
        self._register_mask()

    def _mask_values(self) -> Tensor:
        if self._given_mask is not None:
            return self._given_mask
        out_channels, in_channels, height, width = self.weight.shape
        halves = 2 if self.activation == "gated" and self.color_groups > 1 else 1
        mask = _causal_mask(self.mask_name, (height, width), out_channels // halves, in_channels, self.color_groups)
        return torch.cat([mask] * halves)

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        """Convolve [B, C, H, W] → [B, O, H, W], or [B, O / 2, H, W] where gated.

        condition: broadcastable to [B, O, H, W]; added before the activation.
        """
        return masked_conv2d(
            input,
            self.weight,
            self.bias,
            mask=self.mask,
            dilation=self.dilation,
            activation=self.activation,
            condition=condition,
        )

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel_size = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={tuple(kernel_size)}, mask={self.mask_name}"


def _causal_mask(
    name: str, kernel_size: tuple[int, int], out_channels: int, in_channels: int, color_groups: int
) -> Tensor:
    """Return a named mask of :class:`MaskedConv2d`: bool [kh, kw], or [O, C, kh, kw] with colour groups.

    Raises:
        ValueError: an unknown name; colour groups that do not divide the channels or come with another mask.
    """
    if name not in _MASKS:
        raise ValueError(f"mask must be a tensor or one of {', '.join(_MASKS)}, got {name!r}")
    if color_groups < 1 or out_channels % color_groups or in_channels % color_groups:
        raise ValueError(
            f"color_groups must divide in_channels {in_channels} and out_channels {out_channels}, got {color_groups}"
        )
    if color_groups > 1 and name not in ("A", "B"):
        raise ValueError(f'color_groups needs mask "A" or "B", got {color_groups} with {name!r}')
    height, width = kernel_size
    row, col = torch.arange(height).unsqueeze(1), torch.arange(width)
    center_row, center_col = (height - 1) // 2, (width - 1) // 2
    if name == "vertical":
        return (row <= center_row).expand(height, width)
    if name == "horizontal":
        return (col <= center_col).expand(height, width)
    mask = (row < center_row) | ((row == center_row) & (col < center_col))
    if color_groups > 1:
        mask = mask.repeat(out_channels, in_channels, 1, 1)
    out_color = torch.arange(out_channels).unsqueeze(1) * color_groups // out_channels
    in_color = torch.arange(in_channels) * color_groups // in_channels
    center = in_color < out_color if name == "A" else in_color <= out_color
    mask[..., center_row, center_col] = center if color_groups > 1 else name == "B"
    return mask
