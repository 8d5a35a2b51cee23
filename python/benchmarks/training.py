"""One training step of CPC v1 end to end: our default compared with the plain formulation, and the time of each stage.

Model and batch are those of CPCV2-PyTorch's STL-10 example, but grey: ResNet-14 without norm, 64x64 crops, a 7x7 grid
of 16x16 patches, batch 16, 5 steps, 16 negatives, Adam. "plain" is the usual program: float32, NCHW, ``unfold``,
convolutions with masked weights, gathered negatives. "tuned", the fair rival, is the same program with PyTorch's
optimisations: channels-last, bfloat16 if it is native, the fused Adam. "ours" is a step of ``python -m cpc_ext.train``
on this machine: our ops, and the same three optimisations. Prints images per second and peak memory of all, and the
stages of our step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from unittest.mock import patch

import torch
import torch.nn.functional as F
from charts import draw_training
from machine import add_common_arguments, at_least, describe, result_file, write_json
from memory import peak_extra_bytes
from step_stages import StageClock
from timing import interleaved
from torch import Tensor

from cpc_ext.models import CPC, GatedPixelCNNContext, ResNetV2Encoder
from cpc_ext.nn import GridInfoNCE, ShiftedConv2d
from cpc_ext.ops import extract_patches
from cpc_ext.ops.info_nce import info_nce_reference
from cpc_ext.ops.logistic_mixture import logistic_mixture_nll_reference
from cpc_ext.ops.masked_conv2d import masked_conv2d_reference

GRAY_MEAN, GRAY_STD = 0.4120, 0.2570
IMAGES, IMAGE_SIDE, CROP, PATCH, STRIDE = 500, 96, 64, 16, 8


class OurInput:
    """Makes training batches: random windows, flipped at random, of uint8 images held on the device.

    It makes the same calls as ``cpc_ext.data.ImageFetcher`` and ``PatchView.random``, which it does not use because
    their package imports libraries for reading files that a bare machine with a GPU lacks. A test compares the two.
    """

    def __init__(self, pixels: Tensor, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
        self._pixels = pixels.to(device)
        self._dtype = dtype
        self._device = device
        self._generator = generator

    def __call__(self, indices: Tensor) -> Tensor:
        """Return patches [B, 7, 7, 1, 16, 16] of the images at ``indices`` [B]."""
        batch, slack = len(indices), IMAGE_SIDE - CROP
        shifts = [torch.randint(slack + 1, (batch,), generator=self._generator) for _ in range(2)]
        flip = torch.rand(batch, generator=self._generator) < 0.5
        return extract_patches(
            self._pixels[self._to_device(indices)],
            PATCH,
            STRIDE,
            crop=(CROP, CROP),
            offsets=self._to_device(torch.stack(shifts, dim=1)),
            flip=self._to_device(flip),
            gray=True,
            mean=(GRAY_MEAN,),
            std=(GRAY_STD,),
            dtype=self._dtype,
            channels_last=True,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device has instructions for it, as training does by default, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def make_model(device: torch.device, channels_last: bool) -> CPC:
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(14, in_channels=1)
    model = CPC(encoder, GatedPixelCNNContext(encoder.out_channels), pred_steps=5, neg_samples=16).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


@contextmanager
def plain_ops() -> Iterator[None]:
    """Within the block, replace our ops in layers by plain PyTorch formulas."""

    def patched(module: str, name: str, formula: object) -> AbstractContextManager[object]:
        return patch.object(sys.modules[f"cpc_ext.nn.{module}"], name, formula)

    with (
        patched("conv2d", "kernel_pays", lambda *_, simd: False),
        patched("masked_conv2d", "masked_conv2d", masked_conv2d_reference),
        patched("grid_info_nce", "info_nce", info_nce_reference),
        patched("grid_info_nce", "_CONTRASTS_AS_PREDICTED", ("cpu", "cuda")),
        patch.object(GridInfoNCE, "_contrast_as_predicted", _gathered_contrast),
        patched("nt_xent_loss", "info_nce", info_nce_reference),
        patched("logistic_mixture_loss", "logistic_mixture_nll", logistic_mixture_nll_reference),
        patch.object(ShiftedConv2d, "_convolve", _shifted),
    ):
        yield


def _gathered_contrast(
    layer: GridInfoNCE, contexts: Tensor, keys: Tensor, targets: Tensor, negatives: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of a grid in plain PyTorch: each step gathers its keys, and is a cross-entropy."""
    losses, rights = [], []
    for direction in range(layer.pred_directions):
        steps = zip(sizes, targets[direction].split(sizes), negatives[direction].split(sizes), strict=True)
        for step, (size, own, others) in enumerate(steps):
            queries = contexts[direction, :size] @ layer.weight[direction, step]
            chosen = keys[direction][torch.cat([own.unsqueeze(1), others], dim=1)]
            scores = (chosen @ queries.unsqueeze(2)).squeeze(2).float()
            losses.append(F.cross_entropy(scores, own.new_zeros(size)))
            rights.append((scores.argmax(dim=1) == 0).float().mean())
    of_steps = [torch.stack(values).view(layer.pred_directions, -1) for values in (losses, rights)]
    return of_steps[0].mean(), *of_steps


def _shifted(
    layer: ShiftedConv2d, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, added: Tensor | None
) -> Tensor:
    """Compute a shifted convolution as PixelCNN++'s programs do: pad above and at the sides, and convolve."""
    (input,) = inputs
    (top, left), (_, right) = layer.taps[0], layer.taps[-1]
    output = F.conv2d(F.pad(input, (-left, right, -top, 0)), weight, bias, stride=layer.stride)
    return output if added is None else output + added


def plain_patches(images: Tensor) -> Tensor:
    """Convert uint8 [B, 3, 64, 64] to grey, normalised patches [B, 7, 7, 1, 16, 16]."""
    floating = images.float() / 255
    gray = 0.299 * floating[:, 0] + 0.587 * floating[:, 1] + 0.114 * floating[:, 2]
    gray = ((gray - GRAY_MEAN) / GRAY_STD).unsqueeze(1)
    return gray.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE).permute(0, 2, 3, 1, 4, 5).contiguous()


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    optimizer.step()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="B", help="images per step (default 16, 4 with --quick)"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="timed steps of each program (default 7, 2 with --quick)"
    )
    parser.add_argument("--float32", action="store_true", help="run tuned and ours in float32 in any case")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.repeats is None:
        arguments.repeats = 2 if arguments.quick else 7
    if arguments.batch_size is None:
        arguments.batch_size = 4 if arguments.quick else 16
    if arguments.repeats < 2:
        parser.error(f"--repeats must be at least 2 for quartiles, got {arguments.repeats}")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    device, batch_size = torch.device(arguments.device), arguments.batch_size
    dtype = torch.float32 if arguments.float32 else native_dtype(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 3, IMAGE_SIDE, IMAGE_SIDE), dtype=torch.uint8, generator=generator)
    our_batches = OurInput(pixels, dtype, device, generator)
    indices = torch.arange(batch_size)
    cropped = pixels[:batch_size, :, 16:80, 16:80].to(device)

    plain, tuned, ours = (make_model(device, channels_last) for channels_last in (False, True, True))
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=2e-4)
    tuned_optimizer, our_optimizer = (
        torch.optim.Adam(model.parameters(), lr=2e-4, fused=True) for model in (tuned, ours)
    )

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def plain_loss() -> Tensor:
        with plain_ops():
            return plain(plain_patches(cropped)).loss

    def tuned_loss() -> Tensor:
        with plain_ops(), autocast():
            return tuned(plain_patches(cropped)).loss

    def our_input() -> Tensor:
        return our_batches(indices)

    def our_loss(patches: Tensor) -> Tensor:
        with autocast():
            return ours(patches).loss

    steps = {
        "plain": lambda: step(plain_optimizer, plain_loss),
        "tuned": lambda: step(tuned_optimizer, tuned_loss),
        "ours": lambda: step(our_optimizer, lambda: our_loss(our_input())),
    }
    times = interleaved(
        {**steps, "ours, input alone": our_input},
        repeats=arguments.repeats,
        device=device,
        warmup=1,
        untimed=1,
    )
    peaks = {}
    for (name, call), optimizer in zip(steps.items(), (plain_optimizer, tuned_optimizer, our_optimizer), strict=True):
        optimizer.zero_grad(set_to_none=True)  # A step starts with weights and the optimizer's state only.
        peaks[name] = peak_extra_bytes(call, device)

    clock = StageClock(ours, device)
    for _ in range(arguments.repeats):
        clock.step(our_optimizer, our_input, our_loss)
    stages = clock.medians()

    ratios = {name: times[name].median / times["ours"].median for name in ("plain", "tuned")}
    images_per_second = {name: batch_size / times[name].median for name in steps}
    for name, value in times.items():
        memory = f"   {peaks[name] / 2**20:8.1f} MiB at the peak" if name in peaks else ""
        print(f"{name:<20}{value}   {batch_size / value.median:10.1f} images/s{memory}")
    precision = str(dtype).removeprefix("torch.")
    input_share = times["ours, input alone"].median / times["ours"].median
    print(
        f"ours in {precision} is {ratios['plain']:.2f} times as fast as plain and {ratios['tuned']:.2f} times as fast "
        f"as tuned; its input is {input_share:.2%} of a step"
    )
    print_stages(stages)
    if arguments.out is not None:
        out = result_file(arguments.out, arguments.device, "training")
        document = {
            "machine": describe(arguments.device),
            "batch_size": batch_size,
            "precision": precision,
            "seconds": {name: asdict(value) for name, value in times.items()},
            "images_per_second": images_per_second,
            "ratios": ratios,
            "peak_extra_bytes": peaks,
            "stages": stages,
        }
        write_json(out, document)
        print(f"written: {out}")
        draw_training(document, out.with_suffix(".png"))


def print_stages(stages: dict[str, dict[str, float]]) -> None:
    total = sum(sum(passes.values()) for passes in stages.values())
    columns = ("forward", "backward", "update")
    print(f"\n{'stage of ours':<14}" + "".join(f"{name + ' ms':>13}" for name in columns) + f"{'share':>8}")
    for stage, passes in stages.items():
        cells = "".join(f"{passes[name] * 1e3:>13.2f}" if name in passes else f"{'-':>13}" for name in columns)
        print(f"{stage:<14}{cells}{sum(passes.values()) / total:>8.1%}")


if __name__ == "__main__":
    main(parse_arguments())
