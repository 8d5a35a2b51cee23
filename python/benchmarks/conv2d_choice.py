"""Measures which convolutions `cpc_ext.ops` computes faster on the CPU than PyTorch: the basis of `nn.Conv2d`'s choice.

Measures forward and the gradients of input, weight and bias, channels-last, on one thread, both in turn. Times are CPU
time, not the clock's, so that other programs hardly matter; the fastest of some rounds counts. Writes one row for each
case to `conv2d_choice.csv` next to this program: the vector instructions of this processor, milliseconds of both, and
the choice of `cpc_ext.nn.conv2d.kernel_pays`. Rows of other instructions stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import at_least

from cpc_ext.nn.conv2d import kernel_pays, vector_instructions
from cpc_ext.ops import conv2d

TABLE = Path(__file__).with_suffix(".csv")
DTYPES = ("float32", "bfloat16")
# Side and stride of the kernel; input and output channels; side of the output.
KERNELS = ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1))
CHANNELS = ((3, 64), (16, 16), (32, 32), (64, 64), (64, 256), (256, 64), (128, 128), (256, 256), (512, 512))
SIDES = (2, 4, 8, 16, 32)
# Floating-point operations of a forward pass for which the batch size is chosen, and the largest batch.
FLOPS, MOST_IMAGES = 4e8, 784


class Case(NamedTuple):
    """What a row of the table was measured on, and its sizes."""

    simd: str
    dtype: str
    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    side: int
    images: int

    @property
    def pays(self) -> bool:
        return kernel_pays(
            getattr(torch, self.dtype),
            self.images,
            (self.in_channels, self.out_channels),
            (self.side, self.side),
            self.kernel,
            self.stride,
            simd=self.simd,
        )


def cases(simd: str, dtype: str) -> Iterator[Case]:
    for kernel, stride in KERNELS:
        for before, after in CHANNELS:
            for side in SIDES:
                images = int(FLOPS / (2 * side**2 * before * after * kernel**2))
                for batch in sorted({1, 8, max(8, min(images, MOST_IMAGES))}):
                    yield Case(simd, dtype, kernel, stride, before, after, side, batch)


def milliseconds(case: Case, rounds: int) -> tuple[float, float]:
    """Measure the milliseconds of PyTorch's convolution and of ours."""
    dtype = getattr(torch, case.dtype)
    side = (case.side - 1) * case.stride + 1
    shapes = (
        (case.images, case.in_channels, side, side),
        (case.out_channels, case.in_channels, case.kernel, case.kernel),
        (case.out_channels,),
    )
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[:2] = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors[:2]]
    for tensor in tensors[0 if case.in_channels > 3 else 1 :]:  # Images need no gradient.
        tensor.requires_grad_()
    options = {"stride": case.stride, "padding": case.kernel // 2}
    grad = torch.randn(case.images, case.out_channels, case.side, case.side).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)

    def run(convolve) -> float:
        start = time.process_time()
        for _ in range(calls):
            output = convolve(*tensors, **options)
            torch.autograd.grad(output, [tensor for tensor in tensors if tensor.requires_grad], grad)
        return (time.process_time() - start) / calls

    calls = 1
    calls = max(1, int(4e-3 / (run(F.conv2d) + 1e-9)))
    times = [(run(F.conv2d), run(conv2d)) for _ in range(rounds + 1)][1:]
    eager, ours = (min(one) * 1e3 for one in zip(*times, strict=True))
    return eager, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--rounds", type=at_least(1), default=4, help="timed rounds of each case (default 4)")
    parser.add_argument("--rule-only", action="store_true", help="update the choices in the table without measuring")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    simd = vector_instructions()
    if simd is None:
        parser.error("this processor has neither AVX-512 nor AVX2, for which nn.Conv2d has rules")
    rows: dict[Case, tuple[float, float]] = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            for row in csv.DictReader(file):
                case = Case(row["simd"], row["dtype"], *(int(row[name]) for name in Case._fields[2:]))
                rows[case] = float(row["pytorch_ms"]), float(row["ours_ms"])
    for dtype in () if arguments.rule_only else arguments.dtype:
        for case in cases(simd, dtype):
            rows[case] = eager, ours = milliseconds(case, arguments.rounds)
            print(*case, f"{eager:.3f} {ours:.3f} {eager / ours:.2f}", "ours" if case.pays else "PyTorch", flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields, "pytorch_ms", "ours_ms", "takes"])
        for case, (eager, ours) in rows.items():
            writer.writerow([*case, f"{eager:.4g}", f"{ours:.4g}", "ours" if case.pays else "pytorch"])


if __name__ == "__main__":
    main()
