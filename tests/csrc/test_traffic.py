"""Counts of the kernels' memory traffic (csrc/core/cuda/emulation/traffic.h) are right, and within the budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cuda_counts import Launch, Problem
from ops import counted_ops
from traffic_budgets import FAULTS, Fault, Place, Traced, broken, check, excess

BENCHMARKS = Path(__file__).parents[2] / "python" / "benchmarks"


def counted(trace: Path, probe: str, *options: str) -> dict:
    """Return the counts of a probe's launch."""
    done = subprocess.run([trace / "traffic_probes", probe, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (launch,) = json.loads(done.stdout)["traffic"]
    return launch


# For each kind of access of a probe: requests, lanes, bytes, and sectors or wavefronts, counted and the least possible.
EXPECTED = {
    "neighbours": {"read": (4, 128, 512, 16, 16), "write": (4, 128, 512, 16, 16)},
    "every_other": {"read": (2, 64, 256, 16, 8), "write": (2, 64, 256, 8, 8)},
    "shifted": {"read": (2, 64, 256, 10, 8), "write": (2, 64, 256, 8, 8)},
    "one_for_all": {"read": (2, 64, 256, 2, 2), "write": (2, 64, 256, 8, 8)},
    "vectors": {"read": (2, 64, 1024, 32, 32), "write": (2, 64, 1024, 32, 32)},
    "single_bytes": {"read": (2, 64, 64, 2, 2), "write": (2, 64, 64, 2, 2)},
    # In iteration i the lanes above i take part: 31, 30, ... of them.
    "lanes_leave": {"read": (31, 496, 1984, 76, 76), "write": (1, 32, 128, 4, 4)},
    "count": {"atomic": (2, 64, 256, 4, 4)},
    "column_of_32": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 128, 32, 1)},
    "column_of_33": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 128, 1, 1)},
    "column_of_34": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 128, 2, 1)},
    "wide_8": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 256, 2, 2)},
    "wide_8_apart": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 256, 4, 2)},
    "wide_16": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 512, 4, 4)},
    "wide_16_apart": {"read": (1, 32, 128, 4, 4), "write": (1, 32, 512, 8, 4)},
    "matrices_80": {"matrix": (1, 32, 512, 4, 4), "write": (1, 32, 128, 4, 4)},
    "matrices_64": {"matrix": (1, 32, 512, 16, 4), "write": (1, 32, 128, 4, 4)},
}


@pytest.mark.parametrize("probe", EXPECTED)
def test_requests_are_those_of_warps_and_what_they_take_is_counted(trace, probe):
    columns = ("requests", "lanes", "bytes", "units", "ideal")
    places = counted(trace, probe)["places"]
    assert {one["way"]: tuple(one[name] for name in columns) for one in places} == EXPECTED[probe]


def test_asynchronous_copies_read_one_memory_and_write_the_other(trace):
    launch = counted(trace, "copies")
    ways = sorted((one["way"], one["space"], one["lanes"], one["units"], one["ideal"]) for one in launch["places"])
    assert ways == [
        ("copied_from", "global", 48, 24, 24),  # Eight lanes of each warp only write zeros.
        ("copied_from", "global", 64, 8, 8),
        ("copied_to", "shared", 64, 2, 2),
        ("copied_to", "shared", 64, 8, 8),
        ("read", "shared", 64, 2, 2),
        ("write", "global", 64, 8, 8),
    ]
    assert launch["copies"] == {"16": 64, "4": 64}
    assert (launch["barriers"], launch["shuffles"], launch["votes"], launch["warp_barriers"]) == (2, 10, 0, 0)


def test_products_are_counted_by_shape(trace):
    assert counted(trace, "matrices_80")["mma"] == {"m16n8k16.bf16": 1, "m16n8k8.tf32": 1}


def test_arithmetic_is_counted_by_unit(trace):
    launch = counted(trace, "arithmetic")
    assert launch["multiplies"] == {"float32": 3 * 64, "float64": 64}
    assert launch["special"] == 2 * 64


def test_what_blocks_and_the_launch_read_for_the_first_time(trace):
    launch = counted(trace, "blocks_share")
    assert (launch["grid"], launch["blocks_run"], launch["block"], launch["shared_bytes"]) == (16, 16, 256, 8192)
    # Each block reads the first 256 values, and 256 of its own.
    assert (launch["block_sectors_read"], launch["block_sectors_written"]) == (16 * 64, 16 * 32)
    read, written = launch["stretches"]
    assert (read[1] - read[0], *read[2:]) == (17 * 32 * 32, 17 * 32, 0)
    assert (written[1] - written[0], *written[2:]) == (16 * 32 * 32, 0, 16 * 32)
    assert written[0] - read[0] == (1 << 13) * 4


def test_a_sample_of_the_blocks_is_spread_over_the_grid(trace):
    launch = counted(trace, "blocks_share", "4")
    assert (launch["grid"], launch["blocks_run"]) == (16, 4)
    assert (launch["block_sectors_read"], launch["block_sectors_written"]) == (4 * 64, 4 * 32)
    assert sum(read for _, _, read, _ in launch["stretches"]) == 5 * 32
    begins = [begin for begin, _, _, written in launch["stretches"] if written]
    assert all(later - earlier >= 3 * 1024 for earlier, later in pairwise(begins))


def test_launches_and_places_have_names(trace):
    launch = counted(trace, "vectors")
    assert launch["kernel"] == "vectors"
    assert launch["function"].endswith("::vectors(float*)")
    assert all("traffic_probes.cu:" in one["place"] for one in launch["places"])


def test_every_probe_is_run(trace):
    names = subprocess.run([trace / "traffic_probes"], capture_output=True, text=True, check=False).stdout.split()
    assert sorted(names) == sorted([*EXPECTED, "arithmetic", "copies", "blocks_share"])


# --- Budgets ---

GOOD = Place("store (cuda.cu:1)", "write", "global", requests=8, lanes=256, bytes=1024, units=32, ideal=32)
LAUNCH = Launch(kernel="op::kernel<float>", grid=1, block=32, unique_read_bytes=1000, unique_written_bytes=500)
PROBLEM = Problem(
    op="op", label="[1]", dtype="float32", passes="forward", source="traced", minimum_bytes=1000, launches=(LAUNCH,)
)


def rules(*places: Place) -> list[str]:
    return [rule for rule, _ in broken(Traced(LAUNCH, places))]


def test_places_that_ask_for_more_sectors_or_conflict_break_a_rule():
    shared = replace(GOOD, space="shared")
    assert rules(GOOD, shared) == []
    assert rules(replace(GOOD, units=33), replace(GOOD, units=34)) == ["sectors"]  # 3 and 6 % too many.
    assert rules(replace(shared, units=33)) == ["conflicts"]
    # A place with less than a tenth of the kernel's traffic to this memory does not matter, whatever the other's.
    small = replace(GOOD, units=40, ideal=10)
    assert rules(replace(GOOD, units=1000, ideal=1000), small) == []
    assert rules(replace(shared, units=1000, ideal=1000), small) == ["sectors"]


def checked(places: list[Place], *faults: Fault, problem: Problem = PROBLEM, budget: float = 1.5) -> list[str]:
    return check([(problem, [Traced(LAUNCH, tuple(places))])], {PROBLEM.key: budget}, faults)


def test_a_broken_rule_is_wrong_unless_it_is_a_known_fault():
    bad = replace(GOOD, units=64)
    assert checked([GOOD]) == []
    assert checked([bad]) == [
        "op::kernel<float>: sectors: write global takes 64 where 32 would do, in store (cuda.cu:1)"
    ]
    known = Fault("sectors", "op::kernel<*>", "rows are odd", "store")
    assert checked([bad], known) == []
    assert len(checked([bad], replace(known, place="load"))) == 2  # The fault is unexplained, and this one not needed.
    assert len(checked([bad], replace(known, rule="conflicts"))) == 2
    assert checked([GOOD], known) == ["op::kernel<*>: sectors (rows are odd): mended, so remove it from the faults"]
    # A known fault of a kernel that did not run counts as neither found nor mended.
    assert checked([GOOD], replace(known, kernels="op::other")) == []


def test_a_problem_that_touches_more_than_its_budget_is_wrong():
    assert excess(PROBLEM) == 1.5
    assert checked([GOOD], budget=1.4) == []  # A tenth more is tolerated.
    assert checked([GOOD], budget=1.3) == ["op [1] float32 forward: touches 1.50 times its bytes, its budget is 1.3"]
    (missing,) = checked([GOOD], problem=replace(PROBLEM, dtype="float16"))
    assert missing == "op [1] float16 forward: no budget; --update makes one"


def counts_of(trace: Path, out: Path, *options: str) -> list[dict]:
    """Run cuda_traffic.py, check that no problem exceeds its budget, and return the problems."""
    (module,) = trace.glob("_C.*.so")
    environment = os.environ | {"CPC_EXT_NATIVE": str(module), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, BENCHMARKS / "cuda_traffic.py", "--quick", "--check", "--out", out]
    done = subprocess.run([*program, *options], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[done.stdout.find("\nunique:") :] + done.stderr
    return json.loads(out.read_text())["problems"]


def test_no_kernel_asks_for_more_than_it_may(trace, tmp_path):
    problems = counts_of(trace, tmp_path / "all.json", "--dtype", "float32", "bfloat16")
    assert {problem["op"] for problem in problems} == {*counted_ops()}
    assert all(problem["launches"] for problem in problems)
    # The blocks of a sample do not depend on what ran before, so bytes are equal. Sectors depend on tensors' addresses.
    alone = counts_of(trace, tmp_path / "alone.json", "--op", "masked_conv2d", "--dtype", "bfloat16")
    same = [each for each in problems if each["op"] == "masked_conv2d" and each["dtype"] == "bfloat16"]
    read, read_among_others = (
        [(launch["kernel"], launch["read_bytes"]) for each in run for launch in each["launches"]]
        for run in (alone, same)
    )
    assert read == read_among_others != []


def test_reasons_are_given_for_known_faults():
    assert all(fault.reason and fault.rule in ("sectors", "conflicts") for fault in FAULTS)
