"""No kernel has a race: csrc/core/cuda/emulation/races.h finds those that are planted, and none in the ops."""

import re
import subprocess
from pathlib import Path

import pytest

PROBES = Path(__file__).parent / "race_probes.cu"
# Each planted race, and what races: the kinds of accesses, as the report calls them, of any of its races.
RACES = {
    "lost_update": {("write", "read"), ("write", "write"), ("read", "write")},
    "same_value": {("write", "write")},
    "write_then_read": {("write", "read"), ("read", "write")},
    "read_then_write": {("read", "write"), ("write", "read")},
    "many_readers": {("read", "write"), ("write", "read")},
    "neighbours": {("write", "write")},
    "atomic_and_plain": {("atomic operation", "read"), ("read", "atomic operation")},
    **{
        f"no_fence_{between}": {("write", "read"), ("read", "write")}
        for between in ("shuffle", "vote", "product", "half_masks", "other_warp")
    },
    "rows_before_load": {("write", "read")},
    "rows_after_load": {("read", "write")},
    "chain_of_masks": {("write", "read"), ("read", "write")},
    "read_before_wait": {("asynchronous write", "read")},
    "read_of_later_group": {("asynchronous write", "read")},
    "read_of_others_copy": {("write", "read"), ("read", "asynchronous write"), ("asynchronous write", "read")},
    "barrier_without_wait": {("asynchronous write", "read")},
    "source_overwritten": {("asynchronous read", "write")},
    "destination_overwritten": {("asynchronous write", "write")},
    "two_copies_to_one_place": {("asynchronous write", "asynchronous write")},
    "pipeline_of_two": {("read", "asynchronous write"), ("asynchronous write", "read"), ("write", "read")},
    "update_by_blocks": {("write", "read"), ("write", "write"), ("read", "write")},
    "read_by_blocks": {("read", "write"), ("write", "read")},
    "copied_by_blocks": {("read", "write"), ("write", "asynchronous read"), ("asynchronous read", "write")},
}
ACCESS = re.compile(r"(?:: |  and )([a-z ]+) by block \d+, thread \d+ in (.*)")


def probe(trace: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([trace / "race_probes", *arguments], capture_output=True, text=True, timeout=60)


def marked_lines(name: str) -> set[int]:
    """The lines of a probe's kernel that race, by their marks."""
    kernel = "no_fence" if name.startswith("no_fence_") else name
    lines = PROBES.read_text().split("\n")
    first = next(i for i, line in enumerate(lines) if f"__global__ void {kernel}(" in line)
    last = lines.index("}", first)
    return {i + 1 for i in range(first, last) if lines[i].endswith("// RACE")}


@pytest.mark.parametrize("name", RACES)
def test_a_planted_race_is_found_where_it_is(trace, name):
    done = probe(trace, name)
    assert done.returncode == 1, done.stdout
    assert done.stdout.startswith(f"kernel {name}: ")
    found = ACCESS.findall(done.stdout)
    kinds = [kind for kind, _ in found]
    assert found and set(zip(kinds[::2], kinds[1::2])) <= RACES[name]
    lines = {int(line) for _, place in found for line in re.findall(r"race_probes\.cu:(\d+)", place)}
    assert lines == marked_lines(name)


@pytest.mark.parametrize("name", RACES)
def test_no_race_is_found_where_something_orders_the_accesses(trace, name):
    done = probe(trace, name, "ordered")
    assert (done.returncode, done.stdout) == (0, "no race\n")


def test_every_probe_is_run(trace):
    assert sorted(probe(trace).stdout.split()) == sorted(RACES)
