"""The encoder of sound: five strided convolutions from samples [B, 1, T] to frames [B, D, L], one every 160 samples.

At 16 kHz a frame stands for 10 ms, and sees 29 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, SplitEncoder
from cpc_ext.nn.channel_norm import ChannelNorm
from cpc_ext.nn.typed import Sequential
from cpc_ext.ops._library import autocast_dtype, may_take_kernels
from cpc_ext.ops.masked_conv2d import masked_conv2d
from cpc_ext.ops.waveform_conv1d import waveform_conv1d

__all__ = ["NORMALIZATIONS", "PADDINGS", "WaveformBlock", "WaveformEncoder"]

KERNELS = (10, 8, 4, 4, 4)
STRIDES = (5, 4, 2, 2, 2)
# Zeros on either side of each layer's input, by program.
PADDINGS = {"greedy-infomax": (2, 2, 2, 2, 1), "cpc-audio": (3, 2, 1, 1, 1)}
# Factor and shift of samples in ±1. Greedy InfoMax's are for 32-bit integers, whose upper 16 bits are the sample.
NORMALIZATIONS = {"none": (1.0, 0.0), "greedy-infomax": (2.0**31 / 135303504, 1456218.75 / 135303504)}


class SequenceBatchNorm(nn.BatchNorm2d):
    """BatchNorm1d of sequences [B, C, L] that keeps the memory layout of its input.

    PyTorch's CPU kernels run on channels-last images directly; channels-last sequences they process element by element
    into another layout, ten times as slowly.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unsqueeze(2)).squeeze(2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "channel": ChannelNorm,
    "batch": SequenceBatchNorm,
    "instance": lambda channels: nn.InstanceNorm1d(channels, affine=True),
}
_SAMPLE_RATE = 16000

Number = TypeVar("Number", int, float)


class WaveformBlock(EncoderBlock):
    """One layer: a convolution, a norm and ReLU, [B, in, L] → [B, out_channels, L'], the channels last in memory."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, padding: int, norm: str) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv = nn.Conv1d(in_channels, channels, kernel, stride=stride, padding=padding)
        self.norm = NORMS[norm](channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[1] == 1:
            return self._of_waveforms(input)
        bare = isinstance(self.norm, nn.Identity)
        if input.device.type == "cpu" and may_take_kernels():
            made = _conv1d_of_two_strides(input, self.conv, relu=bare)
        else:
            made = self.conv(input)
            if bare:
                return F.relu(made, inplace=True)  # The convolution's gradient does not need its output.
        return made if bare else self._normalised(made)

    def _of_waveforms(self, input: Tensor) -> Tensor:
        """Run the first layer, whose output is the largest, in one pass if the norm is "channel" or "none"."""
        norm = self.norm if isinstance(self.norm, ChannelNorm) else None
        whole = norm is not None or isinstance(self.norm, nn.Identity)
        made = waveform_conv1d(
            input,
            self.conv.weight,
            self.conv.bias,
            stride=self.conv.stride[0],
            padding=int(self.conv.padding[0]),
            scale=None if norm is None else norm.weight,
            shift=None if norm is None else norm.bias,
            eps=0.0 if norm is None else norm.eps,
            relu=whole,
        )
        return made if whole else self._normalised(made)

    def _normalised(self, made: Tensor) -> Tensor:
        """Apply norm and ReLU to the output of a convolution."""
        # Channel and batch norm return views, and autograd copies the whole base of a view that is changed in place.
        # Instance norm changes the layout of sequences, which those copies undo.
        return F.relu(self.norm(made), inplace=isinstance(self.norm, nn.InstanceNorm1d))


def _conv1d_of_two_strides(input: Tensor, conv: nn.Conv1d, *, relu: bool) -> Tensor:
    """Convolve [B, C, L] → [B, O, L'] with a kernel that is two strides long, with or without ReLU.

    The frames of a stride, adjacent in memory, are taken as one frame with the channels of all, over which the
    convolution has two taps and stride 1. So nothing is copied for overlapping windows, and the products are of a shape
    that the CPU's masked convolution handles well.
    """
    stride, pad = conv.stride[0], int(conv.padding[0])
    (batch, channels, length), outputs = input.shape, conv.out_channels
    count = (length + 2 * pad) // stride
    if conv.kernel_size[0] != 2 * stride or count < 2:
        made = conv(input)
        return F.relu(made, inplace=True) if relu else made
    given = input.transpose(1, 2)[:, : count * stride - pad]
    zeros = input.new_zeros(batch, pad, channels)
    frames = torch.cat([zeros, given, zeros[:, : count * stride - pad - given.shape[1]]], 1)
    made = masked_conv2d(
        frames.reshape(batch, 1, count, stride * channels).permute(0, 3, 1, 2),
        conv.weight.view(outputs, channels, 2, stride).permute(0, 3, 1, 2).reshape(outputs, stride * channels, 1, 2),
        conv.bias,
        mask=torch.ones(1, 2, dtype=torch.bool, device=input.device),
        activation="relu" if relu else None,
    )
    # The last frame has no frame after it for the second tap.
    return made[:, :, 0, :-1]


def _receptive_field(layers: int) -> int:
    """Return the number of samples that a frame sees after so many layers."""
    return 1 + sum((kernel - 1) * math.prod(STRIDES[:layer]) for layer, kernel in enumerate(KERNELS[:layers]))


class WaveformEncoder(SplitEncoder):
    """Encoder of CPC on speech (van den Oord et al. 2018, arXiv 1807.03748, section 3.1).

    Five convolutions with biases, kernels 10, 8, 4, 4, 4 and strides 5, 4, 2, 2, 2, each followed by ``norm`` and ReLU.
    Greedy InfoMax has 512 channels and no norm; CPC_audio (Rivière et al. 2020, arXiv 2002.02848) 256, channel norm
    and paddings of its own. Parameters start as those of :class:`torch.nn.Conv1d`.

    Args:
        channels: channels of all layers, or of each of the five.
        norm: "none"; "channel", over the channels of a frame, see :class:`cpc_ext.nn.ChannelNorm`; "batch"; or
            "instance", over the time of a channel.
        padding: zeros on either side of each layer's input: five numbers, or "greedy-infomax" or "cpc-audio" for that
            program's. They decide where the frames are centred.
        normalization: factor and shift of samples in ±1; or "none", or "greedy-infomax" for that program's.

    Attributes:
        out_channels: D.
        downsampling: samples from one frame to the next, 160.
        receptive_field: samples that a frame sees, 465.
        first_center: the sample in the middle of what frame 0 sees: 20 or 79 for the paddings of the programs. Frame i
            is centred at ``first_center + 160 * i``.
        least_frames: minimum number of frames of a waveform: 1, or 2 for instance norm, as one alone has no variance.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """

    layers: Sequential[WaveformBlock]
    downsampling = math.prod(STRIDES)
    receptive_field = _receptive_field(len(KERNELS))

    def __init__(
        self,
        channels: int | Sequence[int] = 512,
        *,
        norm: str = "none",
        padding: str | Sequence[int] = "greedy-infomax",
        normalization: str | tuple[float, float] = "none",
    ) -> None:
        super().__init__()
        widths = (channels,) * len(KERNELS) if isinstance(channels, int) else _numbers("channels", channels)
        if len(widths) != len(KERNELS) or min(widths) < 1:
            raise ValueError(f"channels must be one number or {len(KERNELS)}, each at least 1, got {channels}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.norm = norm
        self.padding = _named("padding", padding, PADDINGS)
        if len(self.padding) != len(KERNELS) or min(self.padding) < 0:
            raise ValueError(f"padding must be {len(KERNELS)} numbers of at least 0, got {padding}")
        self.normalization = _named("normalization", normalization, NORMALIZATIONS)
        if len(self.normalization) != 2:
            raise ValueError(f"normalization must be a factor and a shift, got {normalization}")
        self.layers = Sequential(
            *(
                WaveformBlock(*layer, norm)
                for layer in zip((1, *widths[:-1]), widths, KERNELS, STRIDES, self.padding, strict=True)
            )
        )
        self.out_channels = widths[-1]
        self.least_frames = 2 if norm == "instance" else 1
        self.first_center = self._first_center(len(KERNELS))

    @property
    def stacks(self) -> list[list[EncoderBlock]]:
        """Every layer is a stack of its own."""
        return [[layer] for layer in self.layers]

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encode sound.

        Args:
            waveforms: [B, 1, T] samples of 16 kHz, floating in ±1, or int16 to be scaled by 2**-15.

        Returns:
            Encodings [B, D, L], L as :meth:`frames` says.

        Raises:
            TypeError: samples of another type than the weights'.
            ValueError: waveforms of another shape, or too short for a frame.
        """
        encodings: Tensor = self.layers(self.prepared(waveforms))
        return encodings

    def features(self, waveforms: Tensor) -> Tensor:
        """The same as calling the encoder: [B, D, L]."""
        return self(waveforms)

    def begin(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.prepared(inputs), lambda features: features

    def prepared(self, waveforms: Tensor) -> Tensor:
        """Return the first layer's input, [B, 1, T], for an input of :meth:`forward`, with the same errors."""
        if waveforms.ndim != 3 or waveforms.shape[1] != 1:
            raise ValueError(f"waveforms must be [B, 1, T], got shape {tuple(waveforms.shape)}")
        scale, shift = self.normalization
        dtype = next(self.parameters()).dtype
        if waveforms.dtype == torch.int16:
            waveforms = waveforms.to(dtype)
            scale *= 2.0**-15
        elif not waveforms.is_floating_point():
            raise TypeError(f"waveforms must be floating in ±1, or int16, got {waveforms.dtype}")
        elif waveforms.dtype != dtype and (
            autocast_dtype(waveforms.device) is None or torch.float64 in (waveforms.dtype, dtype)
        ):
            raise TypeError(f"waveforms must be of the encoder's type, {dtype}, or int16, got {waveforms.dtype}")
        if self.frames(waveforms.shape[2]) < self.least_frames:
            what = "a frame takes" if self.least_frames == 1 else "two frames, which instance norm needs, take"
            raise ValueError(
                f"waveforms of {waveforms.shape[2]} samples are too short: {what} at least {self._shortest()}"
            )
        if scale != 1:
            waveforms = waveforms * scale
        return waveforms + shift if shift else waveforms

    def frames(self, samples: int, *, layers: int = len(KERNELS)) -> int:
        """Return the number of frames L that a waveform has after so many layers. samples: length of the waveform."""
        for kernel, stride, pad in zip(KERNELS[:layers], STRIDES[:layers], self.padding[:layers], strict=True):
            # An empty waveform has no frames, even if the padding would fill one.
            samples = max((samples + 2 * pad - kernel) // stride + 1, 0) if samples else 0
        return samples

    def pieces(self, samples: int, length: int, *, layers: int = len(KERNELS)) -> list[tuple[slice, slice]]:
        """Divide a waveform of so many samples into pieces of about ``length``, to be encoded with little memory.

        A piece is a slice of the samples, and a slice of its frames, after so many layers, which are frames of the
        whole: other frames are next to a cut and see zeros in place of the samples behind it. Instance norm needs the
        whole waveform as one piece.
        """
        step = math.prod(STRIDES[:layers])
        frames, own = self.frames(samples, layers=layers), max(length // step, 1)
        if self.norm == "instance" or frames <= own:
            return [(slice(0, samples), slice(0, frames))]
        # Enough for a frame after all layers, so that a piece is never too short.
        margin = -(-self.receptive_field // step) + 1
        parts = []
        for first in range(0, frames, own):
            begin, last = max(first - margin, 0), min(first + own, frames)
            end = samples if last == frames else min((last + margin) * step, samples)
            parts.append((slice(begin * step, end), slice(first - begin, last - begin)))
        return parts

    def frame_centers(self, frames: int, *, layers: int = len(KERNELS)) -> Tensor:
        """Return the samples at which the first frames are centred, after so many layers, int64 [frames]."""
        return self._first_center(layers) + math.prod(STRIDES[:layers]) * torch.arange(frames)

    def frame_times(self, frames: int) -> Tensor:
        """Return the times of the first frames, in seconds from the waveform's first sample, float64 [frames]."""
        return self.frame_centers(frames).double() / _SAMPLE_RATE

    def _first_center(self, layers: int) -> int:
        before = sum(pad * math.prod(STRIDES[:layer]) for layer, pad in enumerate(self.padding[:layers]))
        return _receptive_field(layers) // 2 - before

    def _shortest(self) -> int:
        samples = self.least_frames
        for kernel, stride, pad in zip(KERNELS[::-1], STRIDES[::-1], self.padding[::-1], strict=True):
            samples = max((samples - 1) * stride + kernel - 2 * pad, 1)
        return samples


def _named(name: str, value: str | Sequence[Number], known: Mapping[str, tuple[Number, ...]]) -> tuple[Number, ...]:
    """Return the values as a tuple, or the known ones if ``value`` is a name."""
    if not isinstance(value, str):
        return _numbers(name, value)
    if value not in known:
        raise ValueError(f"{name} must be numbers or one of {', '.join(known)}, got {value!r}")
    return known[value]


def _numbers(name: str, values: Sequence[Number]) -> tuple[Number, ...]:
    """Return several numbers as a tuple. TypeError for anything else."""
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}") from None
