"""The sorting of pairs of queries and keys in sampled contrasts on CUDA: csrc/info_nce/sort_pairs.cuh."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpc_ext.ops._contrast_problem import Contrast

# Further tensors that the kernels take or fill, beside the inputs of a contrast.
OTHERS = (
    *("row_weights", "thresholds", "present", "losses", "ranks", "slopes", "bests"),
    *("grad_queries", "grad_keys", "grad_bias"),
)


def line(count: int) -> int:
    """Return the bytes that `count` uint32 take in the workspace."""
    return -(-4 * count // 64) * 64


def order_and_segments(module, keys: int, negatives: Tensor, targets: Tensor | None, measure: str) -> list[list[int]]:
    """Return the sorted pairs and the segments, which the kernels leave at the end of the workspace.

    Args:
        module: The compiled module.
        keys: Number of keys in each entry of the batch.
        negatives: Indices [B, M, S].
        targets: Indices [B, M, P]; None for the diagonal.
        measure: Name of the measure; "log_sum" has no positives.
    """
    batch, rows, samples = negatives.shape
    places = 0 if measure == "log_sum" else 1 if targets is None else targets.shape[2]
    arguments = {
        **dict.fromkeys((*Contrast._fields, *OTHERS)),
        "queries": torch.ones(batch, rows, 1),
        "keys": torch.ones(batch, keys, 1),
        "targets": targets,
        "negatives": negatives,
        "losses": torch.empty(batch, rows),
        "ranks": torch.empty(batch, rows, dtype=torch.int64),
        "grad_bias": torch.empty(batch, keys),
        "scale": 1.0,
        "factor": 1.0,
        "measure": measure,
        "contrast": "all",
        **dict.fromkeys(("symmetric", "self_contrast", "tf32"), False),
    }
    module.emulate_cuda(True)
    try:
        workspace = torch.full((module.info_nce_workspace(**arguments),), 0x7F, dtype=torch.uint8)
        module.info_nce(**arguments, workspace=workspace)
    finally:
        module.emulate_cuda(False)
    pairs, segments = batch * rows * (places + samples), batch * keys + 1
    rest = workspace[len(workspace) - line(pairs) - line(segments) :].view(torch.int32)
    return [rest[:pairs].tolist(), rest[line(pairs) // 4 :][:segments].tolist()]


def expected(keys: int, negatives: Tensor, targets: Tensor | None, measure: str) -> list[list[int]]:
    batch, rows, _ = negatives.shape
    positives = torch.arange(rows).expand(batch, rows).unsqueeze(-1) if targets is None else targets
    named = negatives if measure == "log_sum" else torch.cat([positives, negatives], -1)
    of_entry = torch.arange(batch).view(-1, 1, 1) * keys
    named = torch.where((named >= 0) & (named < keys), named + of_entry, batch * keys).flatten()
    in_order, order = named.sort(stable=True)
    segments = torch.searchsorted(in_order, torch.arange(batch * keys + 1)).tolist()
    return [order[: segments[-1]].tolist(), segments]


def drawn(end: int, *shape: int, start: int = 0) -> Tensor:
    return torch.randint(start, end, shape, generator=torch.Generator().manual_seed(0))


PROBLEMS = {
    "one": (1, drawn(1, 1, 1, 1), None),
    "diagonal": (9, drawn(9, 1, 9, 4), None),
    "entries": (37, drawn(37, 3, 20, 5), drawn(37, 3, 20, 1)),
    "several positives": (37, drawn(37, 2, 20, 5), drawn(37, 2, 20, 3, start=-1)),
    "no key": (12, drawn(15, 2, 30, 7, start=-3), drawn(14, 2, 30, 2, start=-2)),
    "far from any key": (6, drawn(2**62, 1, 9, 7, start=-(2**62)), drawn(6, 1, 9, 1)),
    "one key of all": (50, torch.full((2, 300, 9), 17), torch.full((2, 300, 1), 17)),
    "most keys of none": (5000, drawn(3, 1, 70, 6) * 2400, drawn(5000, 1, 70, 1)),
    "no negatives": (40, drawn(40, 2, 30, 0), drawn(40, 2, 30, 1)),
    "no queries": (5, drawn(5, 2, 0, 3), drawn(5, 2, 0, 1)),
}


@pytest.mark.parametrize("measure", ["softmax", "log_sum"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_emulated_pairs_are_sorted_by_key_and_keep_their_order(emulated_native, name, measure):
    keys, negatives, targets = PROBLEMS[name]
    if measure == "log_sum":
        targets = None
    order, segments = order_and_segments(emulated_native, keys, negatives, targets, measure)
    right_order, right_segments = expected(keys, negatives, targets, measure)
    assert segments == right_segments
    assert order[: len(right_order)] == right_order


@pytest.mark.parametrize("name", ["entries", "no key", "one key of all"])
def test_emulated_few_blocks_sort_as_many(emulated_native, monkeypatch, name):
    monkeypatch.setenv("CPC_EMULATION_GRID", "2")
    test_emulated_pairs_are_sorted_by_key_and_keep_their_order(emulated_native, name, "softmax")


@pytest.mark.parametrize(("keys", "rows"), [(2**20 + 5, 50), (700, 50_000)])
def test_more_keys_than_are_counted_at_a_time_and_parts_of_several_tiles(traced_native, keys, rows):
    negatives = torch.cat([drawn(keys, 1, rows, 9), torch.full((1, rows, 2), keys - 1)], -1)
    traced_native.begin_trace({}, 1)  # The other kernels run only one block each.
    try:
        order, segments = order_and_segments(traced_native, keys, negatives, None, "log_sum")
    finally:
        traced_native.end_trace()
    assert [order, segments] == expected(keys, negatives, None, "log_sum")
