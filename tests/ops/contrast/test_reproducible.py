"""Results are bitwise reproducible with any number of threads, and take no more memory than queries and keys."""

from __future__ import annotations

import pytest
import torch

from tests.ops.contrast.draw import assert_same_bits, draw
from tests.ops.contrast.test_as_an_op import PROBLEMS
from tests.ops.test_info_nce import peak_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_every_time(device, name):
    drawn = draw((70, 70, 33), **PROBLEMS[name])
    assert_same_bits(drawn.run(device), drawn.run(device))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_for_any_number_of_threads(name, batch):
    drawn = draw((400, 400, 24) if batch else (700, 700, 40), batch=batch, **PROBLEMS[name])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = drawn.run(CPU)
        for n in (2, 3, 5):
            torch.set_num_threads(n)
            assert_same_bits(drawn.run(CPU), alone)
    finally:
        torch.set_num_threads(threads)


def test_entries_of_a_batch_have_the_bits_that_they_have_alone():
    for name, options in PROBLEMS.items():
        drawn = draw((60, 60, 20), batch=(5,), **options)
        together = drawn.run(CPU, "none")
        drawn.learns = {key: value[3] if value.ndim else value for key, value in drawn.learns.items()}
        drawn.given = {
            key: tuple(one[3] for one in value) if isinstance(value, tuple) else value[3]
            if isinstance(value, torch.Tensor) and value.ndim else value
            for key, value in drawn.given.items()
        }  # fmt: skip
        alone = drawn.run(CPU, "none")
        assert torch.equal(alone.loss, together.loss[3]), name
        if alone.rank is not None:
            assert torch.equal(alone.rank, together.rank[3]), name


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "sampled"])
def test_memory_grows_with_queries_and_keys(name):
    """The scores alone would take 64 MiB, and plain PyTorch keeps several such matrices."""
    size, dim = 4096, 64
    drawn = draw((size, size, dim), **PROBLEMS[name])
    kept = 64 << 20 if name == "both ways" else 0  # That many bytes are kept of both directions' scores at most.
    peak = peak_bytes(lambda: drawn.run(CPU))
    tensors = sum(value.nbytes for value in (*drawn.learns.values(), *drawn.given.values())
                  if isinstance(value, torch.Tensor))  # fmt: skip
    assert peak < kept + 8 * tensors + (8 << 20)


def test_both_ways_keep_a_bounded_part_of_the_scores():
    problems = [draw((size, size, 8), symmetric=True) for size in (4096, 6144)]
    peaks = [peak_bytes(lambda drawn=drawn: drawn.run(CPU)) for drawn in problems]
    assert peaks[1] < (64 << 20) + (16 << 20)
    assert peaks[1] - peaks[0] < 8 << 20
