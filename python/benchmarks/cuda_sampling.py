"""Predicts the time per pixel of sampling from PixelCNN++ on GPUs, with the kernel that runs all steps of a pixel.

    python python/benchmarks/cuda_sampling.py --machine H100 A100

Blocks that share images wait for each other before most steps, and do little in between, so that the time depends on a
step's chain of latencies and the barrier, not on bytes and operations. The chain follows csrc/pixel_steps/cuda.cu: a
step's description, the values that it reads, its weights, sums over lanes and warps, and the final operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from cuda_machines import MACHINES, Machine
from machine import at_least

from cpc_ext.models import PixelCNNPP
from cpc_ext.models.pixels.stream_features import StreamFeatures
from cpc_ext.ops import PixelStep

__all__ = ["Pixel", "predict"]

# As in csrc/pixel_steps/cuda.cu.
FEATURES, ROWS, WARPS, MOST_BLOCKS = 8, 4, 8, 16
SLICES, GATED_SLICES, WEIGHTS_AHEAD = 128, 64, 8
# Seconds of a barrier among blocks: an atomic operation, a memory fence, and a turn of the others' polling. This is an
# estimate; the barrier of a whole grid reportedly takes 1 to 1.5 us.
BARRIER = 1.5e-6
# Launches for each pixel besides the kernel's: those that make noise and position, and that draw and write the value.
OTHER_LAUNCHES = 10


@dataclass(frozen=True)
class Pixel:
    """Predicted seconds for one pixel of all images: its own steps, its share of a row's steps, and other launches."""

    steps: float
    rows: float
    others: float

    @property
    def seconds(self) -> float:
        return self.steps + self.rows + self.others


def _step_seconds(machine: Machine, step: PixelStep, blocks: int, rows: int) -> float:
    gated = step.residual is not None
    depth, outputs = step.weight.shape
    units = ceil((outputs // 2 if gated else outputs) / FEATURES)
    turns = ceil(depth / (GATED_SLICES if gated else SLICES) / WEIGHTS_AHEAD)
    taps = ceil(sum(len(source.taps) for source in step.sources) / WARPS)
    parts, l2, shared = ceil(rows / ROWS), machine.latency_l2, machine.latency_shared
    describe, stage = 2 * l2, taps * min(rows, ROWS) * l2
    # Five exchanges between lanes, then the sums of the warps one by one; loads of bias, addend and own features.
    finish = turns * l2 + (5 + WARPS) * shared + 2 * l2
    clocks = describe + parts * (stage + ceil(units / blocks) * finish)
    # A block's weights are read at a multiprocessor's share of the second-level cache's rate.
    of_block = parts * ceil(units / blocks) * depth * FEATURES * (2 if gated else 1) * step.weight.element_size()
    waits = step.offset == (0, 0)  # The other offsets of an upsampled map are written without a further barrier.
    return (BARRIER if waits else 0) + max(clocks / machine.clock, of_block / (machine.l2 / machine.multiprocessors))


def predict(machine: Machine, model: PixelCNNPP, images: int, side: int) -> Pixel:
    """Predict the time of one pixel of square images."""
    features = StreamFeatures(model, (images, model.in_channels, side, side), None)
    groups = min(images, machine.multiprocessors)
    blocks = min(MOST_BLOCKS, machine.multiprocessors // groups)
    shared_images = ceil(images / groups)

    def total(steps: Iterable[PixelStep], columns: Sequence[int], times: Sequence[float]) -> float:
        return sum(
            times[step.level] * _step_seconds(machine, step, blocks, shared_images * columns[step.level])
            for step in steps
        )

    levels = range(3)
    of_pixels = total(features._pixel_steps._steps, [1] * 3, [4.0**-level for level in levels])
    of_rows = total(features._row_steps._steps, [side >> level for level in levels], [2.0**-level for level in levels])
    return Pixel(of_pixels + machine.launch, (of_rows + machine.launch) / side, OTHER_LAUNCHES * machine.launch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machine", nargs="+", default=["H100"], choices=[*MACHINES], help="GPUs (default H100)")
    parser.add_argument(
        "--images", type=at_least(1), nargs="+", default=[16], help="numbers of images sampled together (default 16)"
    )
    parser.add_argument("--size", type=at_least(4), default=32, help="side of the images in pixels (default 32)")
    parser.add_argument("--channels", type=at_least(1), default=40, help="channels of a layer (default 40)")
    parser.add_argument(
        "--blocks", type=at_least(1), default=2, help="blocks of each level (default 2: 1.5 million parameters)"
    )
    arguments = parser.parse_args()
    model = PixelCNNPP(3, channels=arguments.channels, blocks=arguments.blocks).eval()
    print(
        f"predicted microseconds a pixel of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"
    )
    print(f"{'':12}{'images':>8}{'steps':>9}{'rows':>9}{'others':>9}{'all':>9}")
    for name in arguments.machine:
        for images in arguments.images:
            pixel = predict(MACHINES[name], model, images, arguments.size)
            parts = (pixel.steps, pixel.rows, pixel.others, pixel.seconds)
            print(f"{name:12}{images:>8}" + "".join(f"{part * 1e6:>9.1f}" for part in parts))


if __name__ == "__main__":
    main()
