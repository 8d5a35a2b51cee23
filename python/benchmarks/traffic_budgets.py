"""Limits on our CUDA kernels' memory traffic: rules for all kernels, and a budget of bytes for each problem.

In the places that account for most of a kernel's traffic, requests to device memory must take hardly more sectors than
their bytes fill, and accesses to shared memory must have no bank conflicts. Known violations are listed with their
reasons; an entry that is no longer needed is an error, too. The bytes that a problem's launches touch, as a multiple of
its arguments and results, must not exceed traffic_budgets.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cuda_counts import Launch, Problem

__all__ = ["BUDGETS", "FAULTS", "Fault", "Place", "Traced", "check", "excess", "ratio", "read_budgets", "write_budgets"]

BUDGETS = Path(__file__).with_name("traffic_budgets.csv")
# Places are checked from this share of their kernel's traffic on.
MAIN = 0.1
# Factors by which sectors may exceed the minimum, and bytes their budget.
SECTORS, BYTES = 1.05, 1.1


@dataclass(frozen=True)
class Place:
    """The memory requests of one place in a kernel, in the blocks that were run.

    place: function, file and line, with its callers. way: read, write, atomic, copied_from, copied_to (both of
    asynchronous copies) or matrix (ldmatrix). space: "global" or "shared". units: sectors of 32 bytes, or wavefronts of
    shared memory. ideal: the smallest number of units for these bytes.
    """

    place: str
    way: str
    space: str
    requests: int
    lanes: int
    bytes: int
    units: int
    ideal: int


@dataclass(frozen=True)
class Traced:
    """A launch, with counts for the whole grid, and its places."""

    launch: Launch
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Fault:
    """A known violation of a rule by kernels.

    rule: "sectors" or "conflicts". kernels: a pattern of names. reason: why they violate it. place: a part of the
    place's function and lines; "" for any.
    """

    rule: str
    kernels: str
    reason: str
    place: str = ""


FAULTS = (
    Fault("sectors", "augment::augment_patches<*>", "rows of patches are shorter than a sector"),
    Fault("conflicts", "augment::augment_patches<*>", "pixels and tables of levels are read at any places"),
    Fault("sectors", "patches::copy_patches<*>", "every other patch in 16 bits begins within a sector"),
    Fault("sectors", "patches::sum_patches<*>", "a row of a patch in 16 bits is shorter than a sector", "sum_group"),
    Fault("sectors", "info_nce::finish_rows<*>", "eight rows' counts are a byte each", "merge_tiles"),
    Fault("sectors", "info_nce::*_bucket*", "pairs are read by rows and go where their keys say"),
    Fault("conflicts", "info_nce::*_bucket*", "keys say which counts lanes add to"),
    Fault(
        "sectors", "info_nce::finish_rows<*>", "a tile's powers of a row are one thread's; they seldom change", "align"
    ),
    Fault("sectors", "info_nce::put_positives<*>", "a value a row"),
    Fault("conflicts", "logistic_mixture::run_tiles<*>", "pixels have an odd pitch, so words of two share banks"),
    Fault("sectors", "masked_conv::pack_weights<*>", "neighbouring lanes take weights of different input channels"),
    Fault("sectors", "masked_conv::differentiate_activation<*>", "a lane stores neighbouring channels one by one"),
)


def ratio(places: Sequence[Place], space: str) -> float:
    """Return the sectors or wavefronts relative to their smallest possible number."""
    of_space = [one for one in places if one.space == space]
    return sum(one.units for one in of_space) / max(sum(one.ideal for one in of_space), 1)


def excess(problem: Problem) -> float:
    """Return the bytes that the launches touch, as a multiple of the problem's arguments and results."""
    touched = sum(launch.unique_read_bytes + launch.unique_written_bytes for launch in problem.launches)
    return touched / max(problem.minimum_bytes, 1)


def broken(traced: Traced) -> Iterable[tuple[str, Place]]:
    """Yield the rules that a launch breaks, and the places."""
    for space, rule, most in (("global", "sectors", SECTORS), ("shared", "conflicts", 1.0)):
        of_space = [place for place in traced.places if place.space == space]
        total = sum(place.units for place in of_space)
        for place in of_space:
            if place.units > most * place.ideal and place.units >= MAIN * total:
                yield rule, place


def check(
    results: Iterable[tuple[Problem, Sequence[Traced]]],
    budgets: dict[tuple[str, ...], float],
    faults: Sequence[Fault] = FAULTS,
) -> list[str]:
    """Return errors: rules broken without a listed reason, exceeded budgets, and listed faults that no longer occur."""
    wrong: dict[str, None] = {}
    kernels, needed = set(), set()
    for problem, launches in results:
        budget = budgets.get(problem.key)
        if budget is None:
            wrong[f"{' '.join(problem.key)}: no budget; --update makes one"] = None
        elif excess(problem) > BYTES * budget:
            wrong[f"{' '.join(problem.key)}: touches {excess(problem):.2f} times its bytes, its budget is {budget}"] = (
                None
            )
        for traced in launches:
            kernels.add(traced.launch.kernel)
            for rule, place in broken(traced):
                known = [fault for fault in faults if _explains(fault, rule, traced, place)]
                needed.update(known)
                if not known:
                    wrong[
                        f"{traced.launch.kernel}: {rule}: {place.way} {place.space} takes {place.units} where "
                        f"{place.ideal} would do, in {place.place}"
                    ] = None
    for fault in faults:
        if fault not in needed and any(fnmatchcase(kernel, fault.kernels) for kernel in kernels):
            wrong[f"{fault.kernels}: {fault.rule} ({fault.reason}): mended, so remove it from the faults"] = None
    return list(wrong)


def _explains(fault: Fault, rule: str, traced: Traced, place: Place) -> bool:
    return fault.rule == rule and fnmatchcase(traced.launch.kernel, fault.kernels) and fault.place in place.place


def read_budgets() -> dict[tuple[str, ...], float]:
    """Read the budgets, multiples of a problem's bytes, by op, label, dtype and passes."""
    with BUDGETS.open(newline="") as file:
        return {(row[0], row[1], row[2], row[3]): float(row[4]) for row in list(csv.reader(file))[1:]}


def write_budgets(results: Iterable[tuple[Problem, Sequence[Traced]]]) -> None:
    """Set the budgets of these problems to what they touch now; keep the others."""
    budgets = read_budgets() if BUDGETS.exists() else {}
    budgets |= {problem.key: round(excess(problem), 2) for problem, _ in results}
    with BUDGETS.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["op", "label", "dtype", "passes", "excess"])
        rows.writerows([*key, budget] for key, budget in sorted(budgets.items()))
