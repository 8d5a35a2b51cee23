"""The loop's small parts on their own: schedule, meters, files, log, checkpoints, random streams."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cpc_ext.training.atomic_file import atomic_file, replace_with_link
from cpc_ext.training.checkpoint import load_checkpoint, save_checkpoint
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.meter import FiniteGuard, Meter
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog, read_metrics
from cpc_ext.training.schedule import learning_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (1, "cosine", 0.1),
        (5, "cosine", 0.5),
        (10, "cosine", 1.0),
        (11, "cosine", 1.0),
        (61, "cosine", 0.5),
        (110, "cosine", 0.5 * (1 + math.cos(math.pi * 0.99))),
        (10, "constant", 1.0),
        (110, "constant", 1.0),
    ],
)
def test_learning_rate(step, schedule, expected):
    rate = learning_rate(step, peak=1.0, total_steps=110, warmup_steps=10, schedule=schedule)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(1, peak=3.0, total_steps=1, warmup_steps=0, schedule="cosine") == 3.0


def test_learning_rate_of_a_run_that_is_all_warmup():
    rates = [learning_rate(s, peak=1.0, total_steps=4, warmup_steps=8, schedule="cosine") for s in (1, 4)]
    assert rates == [0.125, 0.5]


def test_meter_means_and_state():
    meter = Meter(CPU)
    assert meter.means() == {}
    meter.add({"loss": torch.tensor(1.0), "accuracy": torch.tensor(0.25, dtype=torch.bfloat16)})
    other = Meter(CPU)
    other.load_state_dict(meter.state_dict())
    other.add({"loss": torch.tensor(2.0), "accuracy": torch.tensor(0.75)})
    assert other.means() == {"loss": 1.5, "accuracy": 0.5}
    assert meter.means() == {"loss": 1.0, "accuracy": 0.25}
    other.reset()
    assert other.means() == {}


def test_finite_guard_remembers_the_first_bad_step():
    guard = FiniteGuard(CPU)
    guard.watch(1, torch.tensor(1.0), torch.tensor(2.0))
    assert guard.first_bad_step() is None
    guard.watch(2, torch.tensor(1.0), torch.tensor(float("inf")))
    guard.watch(3, torch.tensor(float("nan")))
    guard.watch(4, torch.tensor(1.0))
    assert guard.first_bad_step() == 2


def test_atomic_file_leaves_the_old_content_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way():
        with atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_linked_file_outlives_its_source(tmp_path):
    source, target = tmp_path / "last", tmp_path / "best"
    for content in (b"one", b"two"):
        with atomic_file(source) as file:
            file.write(content)
        replace_with_link(source, target)
    with atomic_file(source) as file:
        file.write(b"three")
    assert target.read_bytes() == b"two"


@pytest.mark.parametrize("position", [0.3, 0.6])
def test_checkpoint_with_a_flipped_bit_is_damaged(tmp_path, position):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.randn(10000)})
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(TrainingError, match="damaged or not one of cpc_ext"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"format": 1, "step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="damaged or not one"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "evil").exists()


def test_checkpoint_of_another_format(tmp_path):
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="format 99"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_log_drops_what_follows_the_checkpoint_and_half_lines(tmp_path):
    run = RunDir(tmp_path)
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    run.metrics.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    log = RunLog(run, after_step=2)
    log.log({"step": 3, "loss": 1.5})
    log.close()
    assert read_metrics(run.metrics) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]


def test_random_streams_go_on_and_differ_by_purpose_and_seed():
    streams = RandomStreams(5, CPU)
    state = streams.state_dict()
    first = [torch.rand(4, generator=streams.views), torch.rand(4, generator=streams.negatives), torch.rand(4)]
    assert not torch.equal(first[0], first[1])
    other = RandomStreams(6, CPU)
    assert not torch.equal(torch.rand(4, generator=other.views), first[0])
    other.load_state_dict(state)
    again = [torch.rand(4, generator=other.views), torch.rand(4, generator=other.negatives), torch.rand(4)]
    assert all(map(torch.equal, first, again))
