"""The speedup of small problems by two threads, on idle cores and on cores that several processes share.

For each op and for PyTorch's matrix product, on the CPU, this compares a call on two threads with one on a single
thread, and the throughput of several processes of two threads each with that of one process of one thread times the
number of cores. A process whose threads wait for each other while other processes hold the cores loses more than its
share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import at_least, describe, result_file, write_json
from timing import interleaved

from cpc_ext.ops import (
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    sample_logistic_mixture,
)

# Pixels, queries or images of a call, which takes from microseconds to tens of milliseconds.
SIZES = (1, 4, 16, 64)
THREADS = 2


def matrix_product(size: int) -> Callable[[], Any]:
    left, right = torch.randn(32 * size, 256), torch.randn(256, 256)
    return lambda: torch.mm(left, right)


def patches(size: int) -> Callable[[], Any]:
    images = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8)
    return lambda: extract_patches(images, 16, 8)


def patches_backward(size: int) -> Callable[[], Any]:
    images = torch.rand(size, 3, 64, 64, requires_grad=True)
    result = extract_patches(images, 16, 8)
    grad = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, images, grad, retain_graph=True)


def contrast(size: int) -> Callable[[], Any]:
    queries, keys = (torch.randn(1, 49 * size, 128, requires_grad=True) for _ in range(2))
    return lambda: torch.autograd.grad(info_nce(queries, keys).loss.sum(), (queries, keys))


def contrast_sampled(size: int) -> Callable[[], Any]:
    queries, keys = (torch.randn(size, 49, 128, requires_grad=True) for _ in range(2))
    negatives = torch.randint(0, 49, (size, 49, 16))
    return lambda: torch.autograd.grad(info_nce(queries, keys, negatives=negatives).loss.sum(), (queries, keys))


def convolution(size: int) -> Callable[[], Any]:
    input = torch.randn(size, 7, 7, 128).permute(0, 3, 1, 2).requires_grad_()
    weight, mask = torch.randn(128, 128, 3, 3, requires_grad=True), torch.ones(3, 3, dtype=torch.bool)
    mask[1, 1:], mask[2] = False, False

    def both_passes() -> Any:
        output = masked_conv2d(input, weight, mask=mask)
        return torch.autograd.grad(output, (input, weight), output.detach())

    return both_passes


def likelihood(size: int) -> Callable[[], Any]:
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8)
    params = torch.randn(size, 100, 16, 16, requires_grad=True)
    return lambda: torch.autograd.grad(logistic_mixture_nll(images, params).sum(), params)


def draws(size: int) -> Callable[[], Any]:
    params, noise = torch.randn(size, 100, 8, 8), torch.rand(size, 13, 8, 8)
    return lambda: sample_logistic_mixture(params, channels=3, noise=noise)


PROBLEMS = {
    "torch.mm": matrix_product,
    "extract_patches": patches,
    "extract_patches, backward": patches_backward,
    "info_nce, both passes": contrast,
    "info_nce sampled, both passes": contrast_sampled,
    "masked_conv2d, both passes": convolution,
    "logistic_mixture_nll, both passes": likelihood,
    "sample_logistic_mixture": draws,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--processes", type=at_least(1), default=4, help="concurrent processes (default 4)")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of concurrent runs (default 2)")
    parser.add_argument("--repeats", type=at_least(2), default=20, help="rounds of one thread against two (default 20)")
    parser.add_argument("--quick", action="store_true", help="one size and short runs, to check that everything runs")
    parser.add_argument("--out", type=Path, metavar="DIR|FILE.json", help="write JSON there")
    return parser.parse_args()


def on_threads(call: Callable[[], Any], threads: int) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(threads)
        return call()

    return run


def one_against_two(name: str, size: int, repeats: int) -> dict[str, float]:
    """Measure the median seconds of a call on one thread and on two, in turn."""
    call = PROBLEMS[name](size)
    times = interleaved({str(count): on_threads(call, count) for count in (1, THREADS)}, repeats=repeats)
    return {"one_thread_seconds": times["1"].median, "two_threads_seconds": times[str(THREADS)].median}


def count_calls(cases, threads: int, seconds: float, barrier, results) -> None:
    """Run the cases in a process, one after another; all processes run the same case at a time."""
    torch.set_num_threads(threads)
    for case, (name, size) in enumerate(cases):
        call = PROBLEMS[name](size)
        call()
        barrier.wait()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            call()
            count += 1
        results.put((case, count / (time.perf_counter() - start)))


def calls_per_second(cases, processes: int, threads: int, seconds: float) -> list[float]:
    """Return the calls per second of all processes together, for each case."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    arguments = cases, threads, seconds, barrier, results
    children = [context.Process(target=count_calls, args=arguments, daemon=True) for _ in range(processes)]
    for child in children:
        child.start()
    rates = [0.0] * len(cases)
    for _ in range(processes * len(cases)):
        case, rate = results.get(timeout=600)
        rates[case] += rate
    for child in children:
        child.join()
    return rates


def main(arguments: argparse.Namespace) -> None:
    sizes = SIZES[1:2] if arguments.quick else SIZES
    seconds, repeats = (0.2, 3) if arguments.quick else (arguments.seconds, arguments.repeats)
    cases = [(name, size) for name in arguments.problem for size in sizes]
    cores = len(os.sched_getaffinity(0))
    alone = calls_per_second(cases, 1, 1, seconds)
    together = calls_per_second(cases, arguments.processes, THREADS, seconds)
    results = []
    print(f"{'problem':34} {'size':>4} {'1 thread':>12} {'2 threads':>12} {'faster':>7} {'together':>9}")
    for (name, size), one, all_of_them in zip(cases, alone, together, strict=True):
        times = one_against_two(name, size, repeats)
        result = {
            "problem": name,
            "size": size,
            **times,
            "calls_per_second_alone": one,
            "calls_per_second_together": all_of_them,
            # Throughput on free cores relative to the measured one.
            "loss": min(cores, arguments.processes) * one / all_of_them,
        }
        faster = times["one_thread_seconds"] / times["two_threads_seconds"]
        one_thread, two_threads = (f"{value * 1e6:9.1f} us" for value in times.values())
        print(f"{name:34} {size:4} {one_thread} {two_threads} {faster:6.2f}x {result['loss']:8.2f}x", flush=True)
        results.append(result)
    print(
        f"faster: on two threads. together: by what factor {arguments.processes} processes of {THREADS} threads get "
        f"less done than {cores} cores of one thread each would."
    )
    if arguments.out is not None:
        environment = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}
        setup = {"processes": arguments.processes, "threads": THREADS, "cores": cores, "environment": environment}
        out = result_file(arguments.out, "cpu", "oversubscription")
        write_json(out, {"machine": describe("cpu"), **setup, "complete": True, "results": results})
        print(f"written: {out}")


if __name__ == "__main__":
    main(parse_arguments())
