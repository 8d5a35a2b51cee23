"""The GPUs of cuda_model.py: rates, sizes and latencies, each with its source.

Sources, named in the comments below:

- [A] NVIDIA A100 Tensor Core GPU Architecture, whitepaper, 2020; A100 80GB datasheet.
- [H] NVIDIA H100 Tensor Core GPU Architecture, whitepaper, 2022; H100 and H200 datasheets (SXM).
- [4] NVIDIA Ada GPU Architecture, whitepaper, 2022. [5] NVIDIA RTX Blackwell GPU Architecture, whitepaper, 2025.
- [G] CUDA C++ Programming Guide, Compute Capabilities: technical specifications, arithmetic throughput (16 special
  functions a clock and multiprocessor everywhere).
- [L] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499: latencies, and
  mma.sync at 63 % of Hopper's peak, which is that of wgmma.
- [J] Jarmusch et al., Dissecting the NVIDIA Blackwell Architecture with Microbenchmarks, arXiv 2507.10789 (RTX 5080).
- [C] chipsandcheese.com, 2 July 2023, Nvidia's H100: 5.5 to 6 TB/s from the L2 cache of the PCIe card, which has 114
  multiprocessors at 1.755 GHz or less.
- [M] github.com/smallscientist1/cuda_microbenchmark, analysis_A100.md and analysis_RTX4090.md: sectors a clock.
- [X] github.com/openxla/xla, gpu_dot_fusion_cost_model.cc: "measured H100 L2 bandwidth", 6.65 TB/s, within a partition.
- [R] results/ in this folder, copies and products measured with each of our own runs.

Figures of [L] and [J], and shares without a letter, were written down from memory; verify them before basing a decision
on one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MACHINES", "Machine"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU. Rates of a multiprocessor (SM) are per clock.

    sm: compute capability that its code is compiled for. clock: boost clock in hertz.
    tensor: dense floating-point operations of tensor cores with sums in float32, by type.
    mma_share: share of these that mma.sync reaches. product_share: share that large products of cuBLAS reach.
    ordinary: multiply-adds on the ordinary units by type. special: exponentials and the like. issue: instructions.
    shared_bytes: bytes from shared memory or the first-level cache.
    dram, l2: bytes per second. copy_share: share of dram that a copy reaches. l2_bytes: size of the L2 cache.
    latency_*: clocks from a load to its value.
    shared_size, registers, threads, blocks: resources of an SM; each block takes another 1 KiB of shared memory.
    launch: seconds from one small kernel of a stream to the next.
    """

    name: str
    sm: int
    multiprocessors: int
    clock: float
    tensor: dict[str, float]
    mma_share: float
    product_share: float
    ordinary: dict[str, float]
    dram: float
    copy_share: float
    l2: float
    l2_bytes: float
    latency_dram: float
    latency_l2: float
    latency_shared: float
    shared_size: int
    threads: int
    blocks: int
    registers: int = 65536  # [G]
    special: float = 16  # [G]
    issue: float = 4  # [A], [H], [4], [5]: four schedulers.
    shared_bytes: float = 128  # [A], [H]; [G]: 32 banks of 4 bytes.
    launch: float = 2.2e-6  # What an empty kernel takes in a full queue; of the order of 2 us on all of these.

    def peak(self, math: str) -> float:
        """Return the peak floating-point operations per second, on tensor cores if they have the type."""
        by_clock = self.tensor[math] if math in self.tensor else 2 * self.ordinary[math]
        return by_clock * self.multiprocessors * self.clock


A100 = Machine(
    name="A100",
    sm=80,
    multiprocessors=108,  # [A]
    clock=1.41e9,  # [A]
    tensor={"bfloat16": 2048, "float16": 2048, "tf32": 1024},  # [A]: 312 and 156 TFLOP/s.
    mma_share=1,  # [L]: 99 %.
    product_share=0.82,  # cuBLAS: about 255 of 312 TFLOP/s, as PyTorch and CUTLASS measure it.
    ordinary={"float32": 64, "float64": 32},  # [A]: 19.5 and 9.7 TFLOP/s.
    dram=2.039e12,  # [A], 80GB SXM.
    copy_share=0.87,  # BabelStream and the like: 1.75 to 1.8 TB/s.
    l2=2560 * 1.41e9,  # [M]
    l2_bytes=40e6,  # [A]
    latency_dram=466,  # [L]
    latency_l2=262,  # [L]
    latency_shared=29,  # [L]
    shared_size=164 << 10,  # [G]
    threads=2048,  # [G]
    blocks=32,  # [G]
)

H100 = Machine(
    name="H100",
    sm=90,
    multiprocessors=132,  # [H]
    clock=1.83e9,  # [H]: the clock of 989 TFLOP/s; without tensor cores it may be 1.98.
    tensor={"bfloat16": 4096, "float16": 4096, "tf32": 2048},  # [H]
    mma_share=0.63,  # [L]
    product_share=0.81,  # [R]: 807 of 989 TFLOP/s in bfloat16, 419 of 495 in TF32.
    ordinary={"float32": 128, "float64": 64},  # [H]
    dram=3.352e12,  # [H]
    copy_share=0.87,  # [R]: 2.93 TB/s.
    l2=6.65e12,  # [X]; [C] by multiprocessors and clocks: 6.6 to 7.2.
    l2_bytes=50e6,  # [H]
    latency_dram=479,  # [L]
    latency_l2=263,  # [L]
    latency_shared=29,  # [L]
    shared_size=228 << 10,  # [G]
    threads=2048,  # [G]
    blocks=32,  # [G]
)

H200 = Machine(**{**H100.__dict__, "name": "H200", "dram": 4.8e12})  # [H]: an H100 with HBM3e.

RTX_4090 = Machine(
    name="RTX 4090",
    sm=80,  # Compute capability 8.9 runs code for 8.0.
    multiprocessors=128,  # [4]
    clock=2.52e9,  # [4]
    tensor={"bfloat16": 512, "float16": 512, "tf32": 256},  # [4]: 165 and 82.6 TFLOP/s, summed in float32.
    mma_share=1,  # [L]
    product_share=0.9,  # About 150 of 165 TFLOP/s.
    ordinary={"float32": 128, "float64": 2},  # [4]
    dram=1.008e12,  # [4]
    copy_share=0.92,  # 0.93 TB/s.
    l2=1536 * 2.52e9,  # [M]
    l2_bytes=72e6,  # [4]
    latency_dram=542,  # [L]
    latency_l2=273,  # [L]
    latency_shared=30,  # [L]
    shared_size=100 << 10,  # [G]
    threads=1536,  # [G]
    blocks=24,  # [G]
)

RTX_5090 = Machine(
    name="RTX 5090",
    sm=120,
    multiprocessors=170,  # [5]
    clock=2.407e9,  # [5]
    tensor={"bfloat16": 512, "float16": 512, "tf32": 256},  # [5]: 209.5 and 104.8 TFLOP/s.
    mma_share=1,  # As on the RTX 4090.
    product_share=0.9,  # As on the RTX 4090.
    ordinary={"float32": 128, "float64": 2},  # [5]
    dram=1.792e12,  # [5]
    copy_share=0.9,  # Between those of the others.
    l2=1536 / 128 * 170 * 2.407e9,  # The same per multiprocessor and clock as on the RTX 4090.
    l2_bytes=96e6,  # [5]
    latency_dram=877,  # [J]
    latency_l2=358,  # [J]
    latency_shared=30,  # [J]
    shared_size=100 << 10,  # [G]
    threads=1536,  # [G]
    blocks=24,  # [G]
)

MACHINES = {machine.name: machine for machine in (A100, H100, H200, RTX_4090, RTX_5090)}
