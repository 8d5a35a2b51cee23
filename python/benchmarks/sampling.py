"""Sampling from PixelCNNs with cached features, compared with running the whole network for every value or pixel.

The whole network costs the same at every pixel, so one row is timed and multiplied; with kept features, whole images
are drawn. Both draw the same images from the same noise, which is checked on that row. The fair rival runs the network
only on the rows so far. Its cost grows with them, so that of the middle row is taken as the mean.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import add_common_arguments, at_least, describe, result_file, write_json
from torch import Tensor

from cpc_ext.models import GatedPixelCNN, PixelCNN, PixelCNNPP

MODELS = {
    "pixelcnn": lambda channels, width, layers: PixelCNN(channels, hidden_channels=width, layers=layers),
    "gated-pixelcnn": lambda channels, width, layers: GatedPixelCNN(channels, channels=width, layers=layers),
    # A sixth of the blocks on each of its six levels, and a sixth fewer features: 1.5 million parameters by default.
    "pixelcnn++": lambda channels, width, layers: PixelCNNPP(
        channels, channels=width * 5 // 6, blocks=max(1, layers // 6)
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="default: all")
    parser.add_argument("--images", type=at_least(1), default=16, help="images sampled together (default 16)")
    parser.add_argument("--size", type=at_least(2), default=32, help="side of the images in pixels (default 32)")
    parser.add_argument("--layers", type=at_least(1), default=12, help="layers or blocks of the network (default 12)")
    parser.add_argument("--width", type=at_least(1), default=48, help="channels of a layer (default 48)")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="rounds (default 3)")
    add_common_arguments(parser)
    return parser.parse_args()


def seconds_of(draw: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    start = time.perf_counter()
    drawn = draw()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, drawn


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    count, size, device = arguments.images, arguments.size, arguments.device
    torch.manual_seed(0)
    model = MODELS[name](3, arguments.width, arguments.layers).to(device).eval()
    known = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)

    def row(cached: bool, rows: int = size) -> Tensor:
        """Draw the last row of images with this many rows."""
        generator = torch.Generator(device).manual_seed(0)
        images = known[:, :, :rows]
        return model.sample(count, (rows, size), images=images, known_rows=rows - 1, generator=generator, cached=cached)

    whole, rows_so_far, kept = [], [], []
    for _ in range(arguments.repeats):
        seconds, expected = seconds_of(lambda: row(cached=False), device)
        whole.append(seconds * size)
        rows_so_far.append(seconds_of(lambda: row(cached=False, rows=size // 2), device)[0] * size)
        kept.append(seconds_of(lambda: model.sample(count, size), device)[0])
    # If two values have nearly the same probability, rounding may decide.
    agreeing = (row(cached=True) == expected).float().mean().item()
    result = {
        "model": name,
        "images": count,
        "size": size,
        "layers": arguments.layers,
        "width": arguments.width,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "whole_network_seconds": statistics.median(whole),
        "rows_so_far_seconds": statistics.median(rows_so_far),
        "kept_features_seconds": statistics.median(kept),
        "ratio": statistics.median(one / other for one, other in zip(whole, kept, strict=True)),
        "ratio_rows_so_far": statistics.median(one / other for one, other in zip(rows_so_far, kept, strict=True)),
        "agreeing_values": agreeing,
    }
    print(
        f"{name}: {count} images of {size}x{size}, {arguments.layers} layers of {arguments.width}: whole network "
        f"{result['whole_network_seconds']:.1f} s (from one row), on the rows so far "
        f"{result['rows_so_far_seconds']:.1f} s (from one row), kept features {result['kept_features_seconds']:.2f} s: "
        f"{result['ratio']:.0f}x and {result['ratio_rows_so_far']:.0f}x; {agreeing:.2%} of a row's values equal",
        flush=True,
    )
    return result


def main(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        arguments.images, arguments.size, arguments.layers, arguments.repeats = 2, 8, 2, 1
    results = [measure(name, arguments) for name in arguments.model]
    if arguments.out is not None:
        out = result_file(arguments.out, arguments.device, "sampling")
        write_json(out, {"machine": describe(arguments.device), "complete": True, "results": results})
        print(f"written: {out}")


if __name__ == "__main__":
    main(parse_arguments())
