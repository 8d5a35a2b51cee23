"""The emulation of CUDA finds errors that a GPU may hide: planted faults are caught, and correct kernels pass."""

import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
RIGHT = [
    *("reverse", "block_sum", "shift_by_none", "shared_write", "packs", "shuffles", "async_copy"),
    *("mma_bf16", "mma_f16", "mma_tf32", "blocks_together"),
    *("static_and_dynamic", "static_and_dynamic_within_the_default", "all_shared_memory"),
]
# Planted faults that show only in the result, in any order of threads.
WRONG_RESULTS = [
    *("dropped_barrier", "dropped_second_barrier", "shared_memory_not_written", "async_copy_not_waited_for"),
    *("wrong_row_of_a_fragment", "wrong_half_of_a_fragment"),
]
# Planted faults and their messages: the kernel, and the block and thread where the fault is that of a thread.
ERRORS = {
    "divergent_barrier": [
        "kernel barrier_in_a_branch, block (0, 0, 0), thread (0, 0, 0): __syncthreads in emulation_check.cu:",
        "is not reached by all: thread (70, 0, 0) waits at __syncthreads in emulation_check.cu:",
    ],
    "barrier_not_reached": [
        "kernel barrier_after_a_return, block (0, 0, 0), thread (0, 0, 0): __syncthreads in emulation_check.cu:",
        "is not reached by all: thread (77, 0, 0) has left the kernel",
    ],
    "shuffle_from_inactive_lanes": [
        "kernel shuffle_in_a_branch, block (0, 0, 0), thread (0, 0, 0): __shfl_xor_sync in emulation_check.cu:",
        "names an inactive lane: thread (20, 0, 0)",
    ],
    "barrier_of_blocks_apart": [
        "kernel sum_of_all_blocks, block (",
        "a barrier among blocks that do not run together in block_barrier.cuh:",
    ],
    "block_that_does_not_come": [
        "kernel sum_of_all_blocks, block (1, 0, 0), thread (",
        "waits for 2 blocks in block_barrier.cuh:",
        "which do not all come",
    ],
    "more_blocks_than_run_together": ["kernel sum_of_all_blocks: 3 blocks are more than run together"],
    "misaligned_pack": ["kernel copy_packs, block (0, 0, 0), thread (", "16 bytes at a misaligned address"],
    "read_past_the_end": ["heap-buffer-overflow", "in kernel shift_left, block (0, 0, 0), thread (99, 0, 0)"],
    "shared_memory_not_asked_for": [
        "kernel static_and_dynamic, block (0, 0, 0), thread (",
        "8192 bytes of static and 40961 of dynamic shared memory are more than the 49152 that a block has unless",
    ],
    "more_threads_than_the_launch_bounds": [
        "kernel static_and_dynamic: a block of 128 threads; its launch bounds allow 64"
    ],
    "more_threads_than_a_templates_launch_bounds": [
        "kernel write_ones: a block of 129 threads; its launch bounds allow 128"
    ],
    "grid_too_high": ["kernel write_ones: a grid of (1, 65536, 1) blocks; it has 1 to (2147483647, 65535, 65535)"],
    "block_too_large": ["kernel write_ones: a block of (1024, 2, 1) threads; it has 1 to 1024"],
    "block_too_deep": [
        "kernel write_ones: a block of (1, 1, 128) threads; it has 1 to 1024, at most 64 of them along z"
    ],
    "stream_of_another_device": ["kernel write_ones: a stream of device 1, but device 0 is current"],
    "shared_write_past_the_end": ["heap-buffer-overflow", "in kernel shared_write, block (0, 0, 0), thread (64, 0, 0)"],
}
# The messages about a block that needs more shared memory than the device has, for any limit.
TOO_LARGE = {
    "shared_memory_refused": "CUDA: static_and_dynamic: a block needs {more} bytes of shared memory, beside static",
    "shared_memory_over_the_limit": "8192 bytes of static and {limit} of dynamic shared memory are more than the",
}
# The choices of emulation::Freedom; and below, the choices under which each check is "right", as opposed to "wrong".
FREEDOM = [
    {},
    *({"CPC_EMULATION_ORDER": order} for order in ("forward", "backward", "greedy")),
    {"CPC_EMULATION_COPIES": "early"},
    {"CPC_EMULATION_MATH": "gpu"},
]
DONE_WHERE = {
    "first_lane_first": {"forward"},
    "warps_one_by_one": {"greedy"},
    "source_of_a_copy_written": {"early"},
    "destination_of_a_copy_written": {"rounds", "forward", "backward", "greedy", "gpu"},
    "small_products": {"rounds", "forward", "backward", "greedy", "early"},
    "exact_exponentials": {"rounds", "forward", "backward", "greedy", "early"},
    "inexact_exponentials": {"gpu"},
}
SEEDS = [0, 1, 2]


def run(program: Path, name: str = "", seed: int = 0, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CPC_EMULATION_SEED": str(seed)} | variables
    # Its own sanitizer, not one that this process may run under.
    environment.pop("LD_PRELOAD", None)
    return subprocess.run([program, name], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right(emulation, name, seed):
    done = run(emulation / "emulation_check", name, seed)
    assert (done.returncode, done.stdout) == (0, "right\n")


@pytest.mark.parametrize("freedom", FREEDOM[1:], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right_whatever_a_gpu_does(emulation, name, freedom):
    done = run(emulation / "emulation_check", name, **freedom)
    assert (done.returncode, done.stdout) == (0, "right\n")


@pytest.mark.parametrize("freedom", FREEDOM, ids=str)
@pytest.mark.parametrize("name", DONE_WHERE)
def test_what_a_gpu_may_do_is_done_where_it_is_asked_for(emulation, name, freedom):
    done = run(emulation / "emulation_check", name, **freedom)
    asked = next(iter(freedom.values()), "rounds")
    assert (done.returncode, done.stdout) == (0, "right\n" if asked in DONE_WHERE[name] else "wrong\n")


def test_choices_that_there_are_not_are_refused(emulation):
    for variable in ("CPC_EMULATION_ORDER", "CPC_EMULATION_COPIES", "CPC_EMULATION_MATH"):
        done = run(emulation / "emulation_check", "packs", **{variable: "nonsense"})
        assert (done.returncode, done.stdout) == (1, f"{variable} has no value nonsense\n")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_a_planted_fault_changes_the_result(emulation, name, seed):
    done = run(emulation / "emulation_check", name, seed)
    assert (done.returncode, done.stdout) == (0, "wrong\n")


@pytest.mark.parametrize("name", ERRORS)
def test_a_planted_fault_is_named(emulation, name):
    done = run(emulation / "emulation_check", name)
    assert done.returncode == 1
    for words in ERRORS[name]:
        assert words in done.stdout + done.stderr


@pytest.mark.parametrize("kib", [99, 163, 227])
def test_shared_memory_ends_where_the_device_says(emulation, kib):
    limit = kib << 10
    program = emulation / "emulation_check"
    assert run(program, "all_shared_memory", CPC_EMULATION_SHARED_KIB=str(kib)).stdout == "right\n"
    for name, words in TOO_LARGE.items():
        done = run(program, name, CPC_EMULATION_SHARED_KIB=str(kib))
        assert done.returncode == 1
        # The emulation counts the static variables of all kernels for each kernel.
        static = re.search(r"static variables of (\d+)", done.stdout)
        assert words.format(limit=limit, more=limit + 1 - int(static[1]) if static else 0) in done.stdout


def test_every_check_is_run(emulation):
    names = run(emulation / "emulation_check").stdout.split()
    assert sorted(names) == sorted([*RIGHT, *WRONG_RESULTS, *ERRORS, *TOO_LARGE, *DONE_WHERE])


def test_an_error_reaches_python_and_the_next_launch_works(emulated_native):
    import torch

    emulated_native.emulate_cuda(True)
    try:
        images, patches = torch.zeros(1, 1, 4, 4), torch.empty(1, 1, 1, 1, 4, 4)
        emulated_native.extract_patches(
            images, patches, 4, 4, 4, 4, None, None, False, False, False, [2.0] * 1, [1.0] * 1
        )
        assert patches.eq(1).all()
        with pytest.raises(ValueError, match="at most 64 channels"):
            emulated_native.extract_patches(
                torch.zeros(1, 65, 4, 4), torch.empty(1, 1, 1, 65, 4, 4), 4, 4, 4, 4, None, None, False, False, False,
                [2.0] * 65, [0.0] * 65,
            )  # fmt: skip
    finally:
        emulated_native.emulate_cuda(False)


@pytest.mark.parametrize("kernels", sorted(path.parent.name for path in CSRC.glob("*/cpu.cpp")))
def test_parallel_kernels_have_no_races(emulation, kernels):
    """ThreadSanitizer finds nothing in the CPU kernels, which run on std::thread instead of OpenMP for it."""
    done = run(emulation / "race_check", kernels)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_planted_race_is_found(emulation):
    done = run(emulation / "race_check", "planted_race")
    assert done.returncode == 66
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.cuda
def test_right_kernels_are_right_on_the_gpu(compiled_for_gpu):
    program = compiled_for_gpu("emulation_check")
    for name in RIGHT:
        assert run(program, name).stdout == "right\n", name
