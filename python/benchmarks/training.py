"""One training step of CPC v1 end to end: our default against the plain formulation.

The model and batch of CPCV2-PyTorch's STL-10 example: ResNet-14 without norm, 64x64 crops, a 7x7 grid of 16x16 grey
patches, batch 16, 5 steps, 16 negatives, Adam. Plain is what such programs do: float32, NCHW, ``unfold``. Ours is what
``python -m cpc_ext.train`` does on this machine: patches from the extraction op, channels-last, bfloat16 where it is
native, the fused Adam. Prints images a second of both, their ratio, and what the input pipeline costs a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from timing import interleaved
from torch import Tensor

from cpc_ext.data import ImageFetcher, ImageSet, PatchView
from cpc_ext.models import CPC, GatedPixelCNNContext, ResNetV2Encoder
from cpc_ext.training.precision import autocast, default_precision, patch_dtype

GRAY_MEAN, GRAY_STD = 0.4120, 0.2570


@dataclass
class Options:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    batch_size: int = 16
    """Images of a step."""
    repeats: int = 7
    """Timed steps of each."""
    out: Path | None = None
    """Write the results to this JSON file."""


def make_model(device: str, channels_last: bool) -> CPC:
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(14, in_channels=1)
    model = CPC(encoder, GatedPixelCNNContext(encoder.out_channels), pred_steps=5, neg_samples=16).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def plain_patches(images: Tensor) -> Tensor:
    """uint8 [B, 3, 64, 64] → grey, normalised patches [B, 7, 7, 1, 16, 16]."""
    floating = images.float() / 255
    gray = 0.299 * floating[:, 0] + 0.587 * floating[:, 1] + 0.114 * floating[:, 2]
    gray = ((gray - GRAY_MEAN) / GRAY_STD).unsqueeze(1)
    return gray.unfold(2, 16, 8).unfold(3, 16, 8).permute(0, 2, 3, 1, 4, 5).contiguous()


def step(model: CPC, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    optimizer.step()


def main(options: Options) -> None:
    device = torch.device(options.device)
    precision = default_precision(options.device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (500, 3, 96, 96), dtype=torch.uint8, generator=generator)
    fetch = ImageFetcher(ImageSet(pixels.numpy()), device)
    view = PatchView(
        16,
        8,
        crop=64,
        gray=True,
        mean=(GRAY_MEAN,),
        std=(GRAY_STD,),
        dtype=patch_dtype(precision),
        channels_last=True,
    )
    indices = torch.arange(options.batch_size).numpy()
    cropped = pixels[: options.batch_size, :, 16:80, 16:80].to(device)

    plain, ours = make_model(options.device, channels_last=False), make_model(options.device, channels_last=True)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=2e-4)
    our_optimizer = torch.optim.Adam(ours.parameters(), lr=2e-4, fused=True)

    def our_input() -> Tensor:
        return view.random(fetch(indices), generator)

    def our_loss() -> Tensor:
        with autocast(device, precision):
            return ours(our_input()).loss

    times = interleaved(
        {
            "plain": lambda: step(plain, plain_optimizer, lambda: plain(plain_patches(cropped)).loss),
            "ours": lambda: step(ours, our_optimizer, our_loss),
            "ours, input alone": our_input,
        },
        repeats=options.repeats,
        device=device,
        warmup=1,
        untimed=1,
    )
    ratio = times["plain"].median / times["ours"].median
    for name, value in times.items():
        print(f"{name:<20}{value}   {options.batch_size / value.median:8.1f} images/s")
    input_share = times["ours, input alone"].median / times["ours"].median
    print(f"ours in {precision} is {ratio:.2f} times as fast; its input is {input_share:.2%} of a step")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        seconds = {name: vars(value) for name, value in times.items()}
        document = {"batch_size": options.batch_size, "precision": precision, "seconds": seconds, "ratio": ratio}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
