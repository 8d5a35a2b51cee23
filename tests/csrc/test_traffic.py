"""What kernels ask of a GPU's memory is counted (csrc/core/cuda/emulation/traffic.h), and none asks for too much."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest


def counted(trace: Path, probe: str, *options: str) -> dict:
    """What is counted of a probe's launch."""
    done = subprocess.run([trace / "traffic_probes", probe, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (launch,) = json.loads(done.stdout)["traffic"]
    return launch


# Each probe's ways: requests, lanes, bytes, and sectors or wavefronts, how many there are and the fewest possible.
EXPECTED = {
    "neighbours": {"read": (4, 128, 512, 16, 16), "write": (4, 128, 512, 16, 16)},
    "every_other": {"read": (2, 64, 256, 16, 8), "write": (2, 64, 256, 8, 8)},
    "shifted": {"read": (2, 64, 256, 10, 8), "write": (2, 64, 256, 8, 8)},
    "one_for_all": {"read": (2, 64, 256, 2, 2), "write": (2, 64, 256, 8, 8)},
    "vectors": {"read": (2, 64, 1024, 32, 32), "write": (2, 64, 1024, 32, 32)},
    "single_bytes": {"read": (2, 64, 64, 2, 2), "write": (2, 64, 64, 2, 2)},
    # In round i the lanes above i take part: 31, 30, ... of them.
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
        ("copied_from", "global", 48, 24, 24),  # Eight lanes of each warp only fill with zeros.
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


def test_what_blocks_and_the_launch_read_for_the_first_time(trace):
    launch = counted(trace, "blocks_share")
    assert (launch["grid"], launch["blocks_run"], launch["block"], launch["shared_bytes"]) == (16, 16, 256, 8192)
    # The first 256 values, and as many of the block's own.
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
    assert sorted(names) == sorted([*EXPECTED, "copies", "blocks_share"])
