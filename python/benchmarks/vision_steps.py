"""Times of training steps on images at equal settings: each model with our ops, and with PyTorch's formulas instead.

The models are CPC v1 and Greedy InfoMax with three modules (ResNet-14 without norm, 7x7 grey patches of 16x16, 16
negatives), SimCLR (ResNet-18 with batch norm, CIFAR's stem, two views of 32x32), PixelCNN++ (96 and 48 channels, two
blocks, 32x32 in colour). A step is forward, backward, and the fused Adam. Both sides have the same weights, dtype and
channels-last tensors; the formulas are in ``training.plain_ops``. Prints seconds per step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import NamedTuple

import torch
from machine import add_common_arguments, at_least, describe, result_file, write_json
from timing import interleaved
from torch import Tensor, nn
from training import make_model, native_dtype, plain_ops

from cpc_ext.models import GreedyInfoMax, PixelCNNPP, ResNetV2Encoder, SimCLR


class Case(NamedTuple):
    """A model, the batch size of a step, and the shape of its input for a given batch size."""

    model: Callable[[], nn.Module]
    batch_size: int
    shape: Callable[[int], tuple[int, ...]]


def _patches(batch: int) -> tuple[int, ...]:
    return (batch, 7, 7, 1, 16, 16)


def _greedy() -> nn.Module:
    return GreedyInfoMax(ResNetV2Encoder(14, in_channels=1), 3, pred_steps=5, neg_samples=16)


def _simclr() -> nn.Module:
    return SimCLR(ResNetV2Encoder(18, in_channels=3, norm="batch", stem="cifar"))


def _pixelcnnpp(channels: int) -> nn.Module:
    return PixelCNNPP(channels=channels)


CASES = {
    "CPC v1": Case(lambda: make_model(torch.device("cpu"), True), 16, _patches),
    "Greedy InfoMax, three modules": Case(_greedy, 16, _patches),
    "SimCLR, ResNet-18": Case(_simclr, 64, lambda batch: (2, batch, 3, 32, 32)),
    "PixelCNN++, 96 channels": Case(lambda: _pixelcnnpp(96), 8, lambda batch: (batch, 3, 32, 32)),
    "PixelCNN++, 48 channels": Case(lambda: _pixelcnnpp(48), 8, lambda batch: (batch, 3, 32, 32)),
}


def step_of(model: nn.Module, inputs: Tensor, *, dtype: torch.dtype, plain: bool) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with (
            plain_ops() if plain else nullcontext(),
            torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            if isinstance(model, GreedyInfoMax):
                for output in model.outputs(inputs):  # A module's activations are freed before the next one runs.
                    output.loss.backward()
            elif isinstance(model, PixelCNNPP):
                model.nats(inputs).mean().backward()
            else:
                model(inputs).loss.backward()
        optimizer.step()

    return step


def make_inputs(case: Case, batch_size: int, device: torch.device) -> Tensor:
    shape = case.shape(batch_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    if case.model().__class__ is PixelCNNPP:
        return images.to(device)
    return (images.float() / 128 - 1).to(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="measure only this model; may be repeated")
    parser.add_argument(
        "--repeats", type=at_least(2), metavar="N", help="timed steps of each side (default 5, 2 with --quick)"
    )
    parser.add_argument("--float32", action="store_true", help="run both sides in float32 in any case")
    add_common_arguments(parser)
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    dtype = torch.float32 if arguments.float32 else native_dtype(device)
    precision = str(dtype).removeprefix("torch.")
    repeats = arguments.repeats or (2 if arguments.quick else 5)
    results = []
    for name in arguments.case or CASES:
        case = CASES[name]
        batch_size = 2 if arguments.quick else case.batch_size
        inputs = make_inputs(case, batch_size, device)
        steps = {}
        for side in ("plain", "ours"):
            torch.manual_seed(0)
            model = case.model().to(device, memory_format=torch.channels_last)
            steps[side] = step_of(model, inputs, dtype=dtype, plain=side == "plain")
        times = interleaved(steps, repeats=max(2, repeats), device=device, warmup=1, untimed=0)
        ratio = times["plain"].median / times["ours"].median
        print(f"{name}, {precision}: plain {times['plain']}, ours {times['ours']}, {ratio:.2f} x", flush=True)
        seconds = {side: asdict(time) for side, time in times.items()}
        results.append({"case": name, "batch_size": batch_size, "seconds": seconds, "ratio": ratio})
    if arguments.out is not None:
        out = result_file(arguments.out, arguments.device, "vision_steps")
        machine = describe(arguments.device)
        write_json(out, {"machine": machine, "precision": precision, "complete": True, "results": results})
        print(f"written: {out}")


if __name__ == "__main__":
    main(parse_arguments())
