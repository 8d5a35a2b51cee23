"""Parts of csrc/core that the results of ops do not test: learned numbers of threads, free large pages, and powers of e
on other processors."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def program(compiled) -> Path:
    return compiled("core_check", "-fopenmp")


def output(program: Path, what: str, text: str = "") -> list[int]:
    done = subprocess.run([program, what], input=text, stdout=subprocess.PIPE, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


ZONES = """Node 0, zone      DMA      1      1      1      0      2      1      1      0      1      1      3
Node 0, zone    DMA32   1480    839    546    249    118     62     47     23     12      9    411
Node 1, zone   Normal  90211  51021  20130   9120   1200     73      2      1      0      0      0
"""


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        (ZONES, (1 + 2 * 3) + (9 + 2 * 411)),
        (ZONES.rstrip("\n"), (1 + 2 * 3) + (9 + 2 * 411)),  # Cut off at the end of a buffer.
        ("Node 0, zone Normal 5 5 5\n", 0),
        # With other page sizes of the processor there are fewer or more orders: blocks of order 11 are four pages each.
        ("Node 0, zone Normal 0 0 0 0 0 0 0 0 0 0 0 2\n", 8),
        ("", 0),
        ("Node 0, zone Normal many\n", -1),
    ],
)
def test_free_huge_pages(program, text, pages):
    assert output(program, "buddyinfo", text) == [pages]


def test_loops_learn_how_many_threads_are_faster(program):
    slower, faster, slower_again, small = output(program, "threads")
    # One thread gets four of the first eight runs, then one run after 64, 128, 256 and 512 more, to try it again.
    assert slower == 8
    # One thread is found to be faster when it is tried next, at the end of an interval of 1024 runs that has begun.
    assert 900 < faster < 2000
    assert 900 < slower_again < 1100
    assert small == 10  # Work that is not worth a second thread never gets one.


def test_powers_of_infinite_scores_on_processors_without_avx_512(program):
    """Powers are relative to a finite score, and infinite ones stay infinite, so that the row's loss is not NaN."""
    done = subprocess.run([program, "powers"], stdout=subprocess.PIPE, text=True, check=True)
    powers = [float(power) for power in done.stdout.split()]
    assert powers[:5] == pytest.approx([0, 0, math.exp(-1), 1, math.inf], rel=1e-5)
    assert math.isnan(powers[5])
