"""The training loop on models with one weight in each part: measurements, logs, checkpoints, messages and failures."""

from __future__ import annotations

import copy
import io
import signal
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cpc_ext.data import BatchShare, ImageSet
from cpc_ext.measures.finite import check_finite
from cpc_ext.training import loop, pipeline
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loop import Trainer
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.stop_request import StopRequest
from cpc_ext.training.task import Handover, Task
from tests.tasks.test_every_option import config_of

CPU = torch.device("cpu")


class Part(nn.Module):
    """A part with loss = weight · factor; the weight starts at 100. Its output is twice its input."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([100.0]))
        self.factor = factor
        self.given: list[list[float]] = []
        self.labels: list[list[int] | None] = []
        self.look: Callable[[], object] = lambda: None

    def forward(self, given, labels, streams):
        self.look()
        self.given.append(given.features.flatten().tolist())
        self.labels.append(None if labels is None else labels.tolist())
        loss = self.weight.sum() * self.factor
        return {"loss": loss, "mean": given.features.float().mean()}, Handover(2 * given.features.float())


class Parts(Task):
    """Task of parts whose losses are 1, 2, 3, ... times their weights, on images whose one pixel is their number."""

    def __init__(self, count: int = 1, *, images: int = 12) -> None:
        self.model = nn.ModuleList(Part(1.0 + part) for part in range(count)).eval()
        self.examples = ImageSet(np.arange(images, dtype=np.uint8)[:, None, None, None], np.arange(images) + 50)
        self.updates = 0
        self.observed: list[tuple[int, bool]] = []
        self.before_observing: Callable[[], object] = lambda: None

    def parts(self) -> list[nn.Module]:
        return list(self.model)

    def losses(self, images, labels, streams):
        raise AssertionError

    def updated(self) -> None:
        self.updates += 1

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        self.before_observing()
        self.observed.append((step, self.model.training))
        return {"found": 10.0 * step}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensor": torch.zeros(7)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

    def description(self) -> dict[str, Any]:
        return {"parts": len(self.model)}

    def evaluate(self) -> dict[str, float]:
        return {}

    def save(self, run: RunDir) -> None: ...


@dataclass
class Log:
    """Stub of a RunLog."""

    records: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    before_sync: Callable[[], object] = lambda: None

    def log(self, record: dict[str, float], group: str = "train") -> None:
        self.records.append((group, record))

    def sync(self) -> None:
        self.before_sync()


class Second(Ranks):
    """A process that is not the main one, without connections."""

    main = property(lambda self: False)


def trainer_of(path: Path, task: Task | None = None, ranks: Ranks | None = None, **options: Any) -> Trainer:
    config = config_of("cpc-v1", **options)
    return Trainer(task or Parts(), config, RunDir(path), ranks or Ranks(CPU))


def train(trainer: Trainer, stop_after: int | None = None) -> list[tuple[str, dict[str, float]]]:
    """Train to the end, or until a signal arrives in the given step, and return the logged records."""
    log, stop = Log(), StopRequest()

    def look() -> None:
        if trainer.step == stop_after:
            stop.signal = signal.SIGTERM

    before = trainer._parts.modules[0].look
    trainer._parts.modules[0].look = lambda: (before(), look())
    trainer.train(log, stop)
    trainer._parts.modules[0].look = before
    return log.records


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only by assignments to clock.now, in seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def bars(monkeypatch):
    """The progress bars: options, steps, and what they show."""
    made: list[Any] = []

    class Bar:
        def __init__(self, **options):
            self.options, self.steps, self.shown, self.said = options, 0, [], []
            made.append(self)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def update(self):
            self.steps += 1

        def set_postfix(self, values, refresh):
            self.shown.append((values, refresh))

        def set_description(self, text="", refresh=True):
            self.said.append((self.steps, text, refresh))

    monkeypatch.setattr(loop, "tqdm", Bar)
    return made


# Measurements.


def test_lines_of_the_log(tmp_path, clock, bars):
    """Step n takes n seconds and a bit; looks at the model and saving take 1000, which are no training."""

    def wait(seconds: float) -> None:
        clock.now += seconds

    task = Parts()
    trainer = trainer_of(
        tmp_path, task, steps=5, log_every=2, checkpoint_every=3, lr=0.5, schedule="cosine", final_lr=0.5
    )
    task.model[0].look = lambda: wait(trainer.step + 0.01234)
    task.before_observing = lambda: wait(1000)
    task.observe_every = 4
    log = Log(before_sync=lambda: wait(1000))
    trainer.train(log, StopRequest())
    means = [np.mean(given) for given in task.model[0].given]
    rates = [0.5 * (0.75 + 0.25 * np.cos(np.pi * step / 5)) for step in range(5)]
    losses = [100 - sum(rates[:step]) for step in range(5)]
    expected = [
        {
            "step": last,
            "epoch": round(last / 3, 4),
            "loss": pytest.approx(np.mean(losses[first:last]), rel=1e-5),
            "mean": pytest.approx(np.mean(means[first:last])),
            "grad_norm": 1.0,
            "lr": pytest.approx(rates[last - 1]),
            "images_per_second": speed,
            "seconds": seconds,
        }
        for first, last, speed, seconds in ((0, 2, 2.64, 3.025), (2, 4, 1.14, 10.049), (4, 5, 0.8, 15.062))
    ]
    assert [record for group, record in log.records if group == "train"] == expected
    assert [record for group, record in log.records if group == "observed"] == [
        {"step": 4, "found": 40.0},
        {"step": 5, "found": 50.0},
    ]
    assert [list(record) for _, record in log.records[:1]] == [list(expected[0])]
    assert trainer.last_metrics == expected[-1]
    assert trainer.seconds == pytest.approx(15.0617)
    (bar,) = bars
    assert bar.steps == 5
    assert bar.options == {
        "total": 5,
        "initial": 0,
        "unit": "step",
        "mininterval": 10,
        "dynamic_ncols": True,
        "disable": False,
    }
    assert bar.shown[0] == ({"loss": f"{np.mean(losses[:2]):.3f}", "images/s": "3"}, False)
    assert bar.said == [(step, text, False) for step in (4, 5) for text in ("measuring ...", "")]


def test_the_bar_is_redrawn_where_someone_looks_and_by_one_process(tmp_path, bars, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(loop.sys, "stderr", Terminal())
    trainer = trainer_of(tmp_path, ranks=Second(CPU), steps=3)
    trainer.step = 1
    trainer._task.observe_every = 3
    trainer.train(Log(), StopRequest())
    (bar,) = bars
    assert (bar.options["mininterval"], bar.options["disable"], bar.options["initial"]) == (0.2, True, 1)
    assert bar.said == [(2, "measuring ...", True), (2, "", True)]


def test_a_run_may_begin_with_a_look_at_the_model(tmp_path, clock):
    """It is taken once: of the model as it starts, and after its checkpoint; and it is no training."""

    def wait() -> None:
        clock.now += 1000
        assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == trainer.step

    task = Parts()
    task.observe_every, task.observe_start, task.before_observing = 9, True, wait
    trainer = trainer_of(tmp_path, task, steps=2, checkpoint_every=1)
    train(trainer, stop_after=1)
    assert task.observed == [(0, False)]
    assert trainer.seconds == 0
    resumed = trainer_of(tmp_path, task, steps=1, checkpoint_every=1)
    resumed.resume(load_checkpoint(tmp_path / "checkpoint.pt"))
    train(resumed)
    assert task.observed == [(0, False)]


def test_a_step_takes_no_time_at_all(tmp_path, clock):
    (_, record), *_ = train(trainer_of(tmp_path, steps=1))
    assert record["images_per_second"] == 4e9


def test_the_model_is_in_training_but_for_a_look_at_it(tmp_path, capsys):
    task = Parts()
    task.observe_every = 2
    trainer = trainer_of(tmp_path, task, steps=3)
    modes = []
    task.model[0].look = lambda: modes.append(task.model.training)

    def fail() -> None:
        if trainer.step == 2:
            raise OSError("no room")

    task.before_observing = fail
    records = train(trainer)
    assert modes == [True] * 3
    assert task.observed == [(3, False)]
    assert [record["step"] for group, record in records if group == "observed"] == [3]
    assert "warning: could not write what was observed at step 2 (no room); training goes" in capsys.readouterr().err


def test_encodings_that_cannot_be_measured_do_not_end_a_run(tmp_path, capsys):
    task = Parts()
    task.observe_every = 1
    trainer = trainer_of(tmp_path, task, steps=3)

    def fail() -> None:
        if trainer.step == 2:
            check_finite("labelled", torch.tensor([[1.0], [torch.nan]]))

    task.before_observing = fail
    assert [record["step"] for group, record in train(trainer) if group == "observed"] == [1, 3]
    assert trainer.step == 3
    assert (
        "warning: nothing was observed at step 2: labelled: expected finite numbers, got 1 of 2 rows with others; "
        "training goes on" in capsys.readouterr().err
    )


def test_each_batch_with_its_labels_and_an_update_a_step(tmp_path):
    task = Parts()
    train(trainer_of(tmp_path, task, steps=6))
    assert task.model[0].labels == [[50 + image for image in given] for given in task.model[0].given]
    for epoch in (slice(0, 3), slice(3, 6)):
        assert np.array_equal(np.sort(task.model[0].given[epoch], axis=None), np.arange(12))
    assert task.updates == 6


# Several parts.


def test_parts_learn_by_their_own_losses_and_are_logged_by_number(tmp_path):
    task = Parts(3)
    (_, record), *_ = train(trainer_of(tmp_path, task, steps=2, log_every=1, lr=1e-3))
    given = [part.given[0] for part in task.model]
    assert given[1:] == [[2 * image for image in each] for each in given[:2]]
    expected = {
        "loss": 200.0,
        "mean": np.mean(given),
        "grad_norm": 2.0,
        **{f"loss_module_{part}": 100.0 * (1 + part) for part in range(3)},
        **{f"mean_module_{part}": np.mean(given[part]) for part in range(3)},
        **{f"grad_norm_module_{part}": 1.0 + part for part in range(3)},
    }
    assert {name: record.get(name) for name in expected} == pytest.approx(expected)
    assert list(record)[2:5] == ["loss", "mean", "grad_norm"]
    assert len(record) == 5 + len(expected)
    assert [part.weight.item() for part in task.model] == pytest.approx([100 - 2e-3] * 3, abs=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path, clock, parts):
    """It stops after step 5: between two lines of the log, two checkpoints, and within an epoch."""

    def run(name: str, **how: Any) -> tuple[Trainer, list[Any], list[Any]]:
        task = Parts(parts)
        trainer = trainer_of(tmp_path / name, task, steps=8, log_every=3, checkpoint_every=3, lr=0.5)
        if trainer._run.checkpoint.is_file():
            trainer.resume(load_checkpoint(trainer._run.checkpoint))
        task.model[0].look = lambda: setattr(clock, "now", clock.now + 2)
        return trainer, train(trainer, **how), task.model[0].given

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, records, batches = run("whole")
    first, before, earlier = run("stopped", stop_after=5)
    assert (first.step, first.seconds) == (5, 10)
    second, after, later = run("stopped")
    assert before + after == records
    assert earlier + later == batches
    assert (second.step, second.seconds, second.last_metrics) == (8, 16, whole.last_metrics)
    assert second._task.updates == 8
    for one, other in zip(whole._task.model, second._task.model, strict=True):
        assert torch.equal(one.weight, other.weight)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "stopped")]
    for state in states:
        assert (state["step"], state["seconds"], state["description"]) == (8, 16, {"parts": parts})
        assert state["config"] == whole._config.model_dump(mode="json")
        assert state["last_metrics"] == whole.last_metrics
        del state["model"], state["task"], state["streams"], state["optimizer"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("buffers", "options"),
    [
        (2, {"optimizer": "adam"}),
        (1, {"optimizer": "lars"}),
        (1, {"optimizer": "sgd"}),
        (0, {"optimizer": "sgd", "momentum": 0}),
    ],
)
def test_what_a_checkpoint_takes(tmp_path, buffers, options):
    """Two parameters and the optimizer's buffers of each, of 4 bytes, and the task's tensor of 7."""
    trainer = trainer_of(tmp_path, Parts(2), steps=1, **options)
    assert trainer.checkpoint_bytes == 4 * (2 + 2 * buffers + 7)
    train(trainer)
    states = [learner.state_dict()["optimizer"]["state"] for learner in trainer._parts.learners]
    kept = [v for state in states for of in state.values() for n, v in of.items() if n != "step" and v is not None]
    assert sum(value.numel() for value in kept) == 2 * buffers


# Checkpoints.


def of_losses(path: Path, losses: list[float], **options: Any) -> Trainer:
    """Make a run with these losses, one for each step."""
    task = Parts()
    trainer = trainer_of(path, task, steps=len(losses), **options)
    part = task.model[0]
    part.forward = lambda given, labels, streams: (
        part.look(),
        ({"loss": part.weight.sum() * 0 + losses[trainer.step - 1]}, given),
    )[1]
    return trainer


def test_the_best_checkpoint_is_of_the_interval_with_the_lowest_mean_loss(tmp_path):
    losses = [9.0, 1.0, 0.5, 9.5, 2.0, 2.0, 0.0, 4.0, 0.0]
    trainer = of_losses(tmp_path, losses, checkpoint_every=2, log_every=100)
    found = []
    trainer._parts.modules[0].look = lambda: found.append(
        load_checkpoint(trainer._run.best)["step"] if trainer._run.best.is_file() else None
    )
    train(trainer)
    # The third interval is better than the first, the second is as good, the fourth as good as the third.
    assert found == [None, None, 2, 2, 2, 2, 6, 6, 6]
    assert load_checkpoint(trainer._run.best)["step"] == 9
    state = load_checkpoint(trainer._run.checkpoint)
    assert (state["step"], state["best_loss"], state["since_best"]["count"]) == (9, 0.0, 0)


def test_a_resumed_run_knows_its_best_checkpoint(tmp_path):
    losses = [1.0, 1.0, 2.0, 2.0, 1.5, 1.5, 0.5, 0.5]
    for steps, best in ((4, 2), (6, 2), (8, 8)):
        trainer = of_losses(tmp_path, losses[:steps], checkpoint_every=2)
        if steps > 4:
            trainer.resume(load_checkpoint(trainer._run.checkpoint))
        train(trainer)
        assert load_checkpoint(trainer._run.best)["step"] == best


def test_an_interval_cut_short_is_not_the_best(tmp_path):
    trainer = of_losses(tmp_path, [5.0, 5.0, 0.0, 0.0], checkpoint_every=2, log_every=100)
    train(trainer, stop_after=3)
    state = load_checkpoint(trainer._run.checkpoint)
    assert (state["step"], state["best_loss"], state["since_best"]["count"]) == (3, 5.0, 1)
    assert state["since_log"]["count"] == 3
    assert load_checkpoint(trainer._run.best)["step"] == 2


def failing(monkeypatch, *, steps: dict[int, int]) -> list[tuple[str, int]]:
    """Make this many attempts to save fail at each of these steps, and return all attempts by file and step."""
    original, tried = loop.save_checkpoint, []

    def save(path: Path, state: dict[str, Any]) -> None:
        tried.append((path.name, state["step"]))
        if steps.get(state["step"], 0):
            steps[state["step"]] -= 1
            raise OSError("no room")
        original(path, state)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    return tried


def test_a_checkpoint_that_fails_is_no_best_one(tmp_path, monkeypatch, capsys):
    tried = failing(monkeypatch, steps={4: 1, 6: 1})
    trainer = of_losses(tmp_path, [5.0, 5.0, 1.0, 1.0, 2.0, 2.0], checkpoint_every=2, log_every=100)
    train(trainer)
    # At the last step there may be room again; the interval has been counted by then.
    assert tried == [("checkpoint.pt", 0), ("best.pt", 2), ("best.pt", 4), ("best.pt", 6), ("checkpoint.pt", 6)]
    error = capsys.readouterr().err
    assert "warning: could not save step 4 (no room); the last checkpoint is that of step 2\n" in error
    assert "warning: could not save step 6 (no room); the last checkpoint is that of step 2\n" in error
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["step"], state["best_loss"]) == (6, 5.0)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2


@pytest.mark.parametrize("kind", [Ranks, Second])
def test_a_last_step_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch, kind):
    tried = failing(monkeypatch, steps={3: 2})
    trainer = trainer_of(tmp_path, ranks=kind(CPU), steps=3, checkpoint_every=2)
    if kind is Second:  # The main process says why.
        with pytest.raises(SystemExit) as ended:
            train(trainer)
        assert ended.value.code == 1
        return
    message = (
        f"step 3 of 3 could not be saved (no room): make room; {tmp_path}/checkpoint.pt holds step 2, from which "
        f"python -m cpc_ext.train --resume --out-dir {tmp_path} goes on"
    )
    with pytest.raises(TrainingError) as caught:
        train(trainer)
    assert str(caught.value) == message
    assert len(tried) == 4
    (tmp_path / "checkpoint.pt").unlink()
    assert trainer.on_disk() == f"{tmp_path} holds no checkpoint any more, and with it the training"
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    assert trainer.on_disk() == f"{tmp_path} is gone, and with it the training"
    tmp_path.mkdir()


def test_a_first_checkpoint_that_fails(tmp_path, monkeypatch):
    tried = failing(monkeypatch, steps={0: 1})
    with pytest.raises(TrainingError, match=rf"^--out-dir: cannot write {tmp_path}/checkpoint.pt: no room$"):
        train(trainer_of(tmp_path))
    assert tried == [("checkpoint.pt", 0)]


def test_a_run_without_steps_left_is_not_saved_again(tmp_path, monkeypatch):
    train(trainer_of(tmp_path, steps=2))
    trainer = trainer_of(tmp_path, steps=2)
    trainer.resume(load_checkpoint(tmp_path / "checkpoint.pt"))
    tried = failing(monkeypatch, steps={})
    assert train(trainer) == []
    assert tried == []


# Values that are not finite.


@pytest.mark.parametrize(
    ("options", "cures"),
    [
        ({}, "a lower --lr than 0.25, or --warmup-steps 500, or --clip-grad 1"),
        ({"warmup_steps": 2, "clip_grad": 3.0}, "a lower --lr than 0.25"),
        ({"precision": "bf16", "clip_grad": 3.0}, "a lower --lr than 0.25, or --warmup-steps 500, or --precision fp32"),
    ],
)
def test_what_a_run_that_diverges_says(tmp_path, options, cures):
    trainer = of_losses(tmp_path, [1.0, 1.0, float("nan"), 1.0, 1.0], lr=0.25, log_every=4, **options)
    trainer._parts.modules[0].look = lambda: trainer.step == 2 and trainer._save(Log(), complete_interval=False)
    with pytest.raises(TrainingError) as caught:
        train(trainer)
    assert str(caught.value) == (
        "training diverged: the loss or its gradient is not finite at step 3 (learning rate 0.25); the checkpoint of "
        f"step 2 is kept, the state with it is in {tmp_path}/diverged.pt. Try {cures}"
    )
    assert load_checkpoint(tmp_path / "diverged.pt")["step"] == 4


def test_divergence_that_cannot_be_saved_or_is_told_by_another(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, steps={1: 9})
    trainer = of_losses(tmp_path, [float("inf")])
    with pytest.raises(TrainingError, match=r"the checkpoint of step 0 is kept\. Try"):
        train(trainer)
    assert f"warning: could not save {tmp_path}/diverged.pt (no room)" in capsys.readouterr().err
    trainer = of_losses(tmp_path, [float("inf")])
    trainer._ranks = Second(CPU)
    with pytest.raises(SystemExit) as ended:
        train(trainer)
    assert ended.value.code == 1
    trainer._ranks, trainer._saved_step = Ranks(CPU), None
    with pytest.raises(TrainingError, match=r"\(learning rate 0.0002\)\. Try"):
        trainer._check_finite(parameters=False)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_gradients_that_no_loss_scale_helps_are_divergence(tmp_path, precision):
    """With a finite loss nothing else would tell that no update is ever made."""
    trainer = trainer_of(tmp_path, steps=60, log_every=1, precision=precision)
    part = trainer._task.model[0]
    part.forward = lambda given, labels, streams: ({"loss": (part.weight * 0).sqrt().sum()}, given)
    with pytest.raises(
        TrainingError, match="training diverged: the loss or its gradient is not finite at step"
    ) as told:
        train(trainer)
    assert f"at step {33 if precision == 'fp16' else 1} " in str(told.value)
    assert part.weight.item() == 100 or precision == "fp32"


def test_parameters_are_looked_at_where_they_are_saved(tmp_path):
    task = Parts(2)
    trainer = trainer_of(tmp_path, task, steps=3, log_every=1, checkpoint_every=2)
    task.updated = lambda: trainer.step == 2 and nn.init.constant_(task.model[1].weight, float("nan"))
    with pytest.raises(TrainingError, match="not finite at step 2"):
        train(trainer)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


# Checkpoints that do not fit.


def test_a_checkpoint_that_does_not_fit_says_why(tmp_path):
    train(trainer_of(tmp_path, steps=2))
    path, state = tmp_path / "checkpoint.pt", load_checkpoint(tmp_path / "checkpoint.pt")
    for change, reason in (
        ({"sampler": {**state["sampler"], "batch": 1.0}}, "sampler: expected whole numbers, got"),
        ({"sampler": {**state["sampler"], "seed": 7}}, "sampler state: expected seed 0, got 7"),
        ({"model": {}}, "Error.s. in loading state_dict"),
        ({"task": {}}, "it has no 'updates'"),
    ):
        with pytest.raises(TrainingError, match=f"^--resume: {path} does not fit this run: {reason}"):
            trainer_of(tmp_path).resume({**copy.deepcopy(state), **change})
    for name in ("model", "optimizer", "scaler", "streams", "since_log", "since_best", "best_loss", "seconds", "step"):
        with pytest.raises(TrainingError, match=f"does not fit this run: it has no '{name}'$"):
            trainer_of(tmp_path).resume({key: value for key, value in state.items() if key != name})
    # Checkpoints of before tasks had a state of their own.
    del state["task"]
    with pytest.raises(TrainingError, match=r"it has no 'updates'$"):
        trainer_of(tmp_path).resume(state)
    state["task"] = {"updates": 2}
    with pytest.raises(TrainingError, match=r"^--resume: the run is already at step 2, past the 1 asked for$"):
        trainer_of(tmp_path, steps=1).resume(state)
    trainer_of(tmp_path, steps=2).resume(state)


def test_images_that_are_others(tmp_path, capsys):
    train(trainer_of(tmp_path, steps=2))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    advice = f". Go on with the images as they were, or start a new run from its weights with --resume-from {tmp_path}"
    fewer = Parts(images=9)
    for each in (state, {key: value for key, value in state.items() if key != "data"}):
        with pytest.raises(TrainingError) as caught:
            trainer_of(tmp_path, fewer).resume(each)
        said = "--resume: the data changed since step 2 was saved: 12 images then, 9 now"
        assert str(caught.value) == said + advice
    other = Parts()
    other.examples = ImageSet(other.examples.images, other.examples.labels + 1)
    with pytest.raises(TrainingError, match=r": other labels\. Go on"):
        trainer_of(tmp_path, other).resume(state)
    capsys.readouterr()
    for ranks in (Second(CPU), Ranks(CPU)):
        other = Parts()
        other.examples = ImageSet(other.examples.images + 1, other.examples.labels)
        trainer_of(tmp_path, other, ranks).resume(state)
    said = "warning: --resume: the data changed since step 2 was saved: other pixels\n"
    assert capsys.readouterr().err == said


# Several processes.


@pytest.fixture
def alone(monkeypatch):
    """Replace DistributedDataParallel by the model itself."""
    monkeypatch.setattr("cpc_ext.training.learner.DistributedDataParallel", lambda part, **options: part)


def test_ranks_share_batches(tmp_path, alone):
    options = {"seed": 3, "epochs": 2, "steps": None}
    trainers = [trainer_of(tmp_path, ranks=Ranks(CPU, rank, 2), **options) for rank in range(2)]
    whole = trainer_of(tmp_path, **options)
    assert [trainer._streams.share for trainer in trainers] == [BatchShare(0, 2), BatchShare(1, 2)]
    assert {trainer.total_steps for trainer in (whole, *trainers)} == {6}
    parts = [next(trainer._batches()).tolist() for trainer in trainers]
    assert parts[0] + parts[1] == next(whole._batches()).tolist()
    assert parts[0] + parts[1] != next(trainer_of(tmp_path, seed=4)._batches()).tolist()
    assert whole._streams.views.initial_seed() == 6
    with pytest.raises(TrainingError, match=r"^--batch-size: .* multiple of the 2 processes, got 3$"):
        trainer_of(tmp_path, ranks=Ranks(CPU, 1, 2), batch_size=3)


def test_what_each_rank_carries_from_step_to_step_is_kept(tmp_path, alone):
    """A run goes on with the state of every place in a batch, on any number of processes."""

    class Main(Ranks):
        def gather_on_main(self, value):
            if "rows" not in value:  # The states of generators.
                return [value, value]
            return [value, {"rows": value["rows"] + 10, "alone": torch.tensor([[5.0]])}]

    class Carrying(Parts):
        def carried(self):
            return {"rows": torch.tensor([[1.0], [2.0]])}

        def carry_on(self, carried):
            self.found = {name: rows.flatten().tolist() for name, rows in carried.items()}

    train(trainer_of(tmp_path, Carrying(), Main(CPU), steps=2, batch_size=4))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert {name: rows.flatten().tolist() for name, rows in state["carried"].items()} == {
        "rows": [1, 2, 11, 12],
        "alone": [5],
    }
    del state["carried"]["alone"]
    for world in (1, 2, 4):
        found = []
        for rank in range(world):
            trainer = trainer_of(tmp_path, Carrying(), Ranks(CPU, rank, world), steps=4, batch_size=4)
            trainer.resume(state)
            found += trainer._task.found["rows"]
        assert found == [1, 2, 11, 12]


def test_batch_norm_of_several_ranks(tmp_path, alone, monkeypatch, capsys):
    converted = []
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", converted.append)

    def warned(rank: int, *more: nn.Module, world_size: int = 2) -> str:
        task = Parts()
        task.model.extend(more)
        task.parts = lambda: list(task.model)[:1]
        trainer = trainer_of(tmp_path, task, Ranks(CPU, rank, world_size))
        said = capsys.readouterr().err
        if more and world_size > 1:
            trainer._device = torch.device("cuda")
            trainer._share_batch_norm()
            assert converted.pop() is task.model
        assert converted == []
        assert capsys.readouterr().err == ""
        return said

    assert warned(0, nn.BatchNorm2d(1)).startswith("warning: batch norm takes its statistics of each process's part")
    assert warned(1, nn.BatchNorm2d(1)) == warned(0) == warned(0, nn.BatchNorm2d(1), world_size=1) == ""


# A pipeline of two processes, of which the other one is told here.


class Line:
    """Stub of the connections to the previous and the next process."""

    def __init__(self, ranks: Ranks) -> None:
        self.sent: list[list[float]] = []
        self.asked: list[bool] = []
        self.finished = 0

    def receive(self):
        return torch.full((4, 1, 1, 1), 7.0)

    def send(self, features):
        self.sent.append(features.flatten().tolist())

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag

    def finish(self) -> None:
        self.finished += 1


class Member(Ranks):
    """One of two processes. gathered: what the other process measured, or passes to the main one."""

    gathered: Any = None

    def gather(self, value):
        return [{name: mean for name, mean in self.gathered.items() if name[:-1] + "1" in value}, value]

    def gather_on_main(self, value):
        # The state that steps pass on is gathered as a separate dict, which is empty here.
        return [value, {} if value == {} else self.gathered] if self.main else None

    def on_main(self, action):
        return action()

    def first(self, step):
        return step


def member(path: Path, rank: int, monkeypatch: pytest.MonkeyPatch, gathered: Any = None, **options: Any) -> Trainer:
    monkeypatch.setattr(pipeline, "_Link", Line)
    monkeypatch.setattr(Member, "gathered", gathered)
    return trainer_of(path, Parts(2), Member(CPU, rank, 2, pipeline=True), **options)


def test_the_last_of_a_line(tmp_path, monkeypatch):
    theirs = {"loss_module_0": 50.0, "mean_module_0": 3.0, "grad_norm_module_0": 1.0}
    trainer = member(tmp_path, 1, monkeypatch, theirs, steps=2, log_every=2, lr=0.5)
    part = trainer._task.model[1]
    assert trainer._parameters == [part.weight]
    (_, record), *_ = train(trainer)
    assert part.given == [[7.0] * 4] * 2
    assert all(50 <= label < 62 for labels in part.labels for label in labels)
    line = trainer._parts._link
    assert (line.sent, line.asked, line.finished) == ([[14.0] * 4] * 2, [False] * 2, 1)
    expected = {"loss": (50 + 199.5) / 2, "mean": 5.0, "grad_norm": 1.5, "loss_module_1": 199.5, **theirs}
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert trainer._best_loss == pytest.approx((50 + 199.5) / 2)
    state = trainer._state()
    assert state["since_log"] == {"sums": {}, "count": 0}
    assert [each["state"][0]["step"].item() for each in state["optimizer"]] == [2]


def test_the_first_of_a_line_collects_the_others(tmp_path, monkeypatch):
    trainer = member(tmp_path, 0, monkeypatch, {"loss_module_1": 50.0}, steps=3, checkpoint_every=9, log_every=9)
    monkeypatch.setattr(Trainer, "_save", lambda self, *arguments, **options: None)
    monkeypatch.setattr(Trainer, "_save_first", lambda self, state: None)
    weights = {"weight": torch.tensor([-1.0])}
    meter = {"sums": {"loss_module_1": torch.tensor(4.0)}, "count": 3}
    learner = {"optimizer": {"of": 1}, "scaler": {}}
    monkeypatch.setattr(Member, "gathered", (weights, learner, {"since_log": meter, "since_best": meter}))
    trainer.total_steps = 9
    train(trainer, stop_after=2)
    line, state = trainer._parts._link, trainer._state()
    # Asked before every step; the third time after the signal.
    assert (line.asked, line.finished, len(line.sent)) == ([False, False, True], 1, 2)
    assert len(np.unique(trainer._task.model[0].given)) == 2 * 4
    assert state["model"]["1.weight"].item() == -1
    assert state["model"]["0.weight"].item() == trainer._task.model[0].weight.item() < 100
    assert state["optimizer"][1:] == [{"of": 1}]
    assert state["scaler"] == [{}, {}]
    assert state["optimizer"][0]["state"][0]["step"].item() == 2
    for name in ("since_log", "since_best"):
        assert state[name]["sums"]["loss_module_1"].item() == 4
        assert state[name]["sums"]["loss_module_0"].item() == pytest.approx(200, abs=0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_a_line_goes_on_with_its_part(tmp_path, monkeypatch, rank):
    whole = trainer_of(tmp_path, Parts(2), steps=3, log_every=9, lr=0.5)
    train(whole, stop_after=2)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    trainer = member(tmp_path, rank, monkeypatch, steps=3, log_every=9, lr=0.5)
    trainer.resume(copy.deepcopy(state))
    for meter, name in ((trainer._since_log, "since_log"), (trainer._since_best, "since_best")):
        assert meter.state_dict() == {
            "sums": {key: value for key, value in state[name]["sums"].items() if key.endswith(f"_module_{rank}")},
            "count": 2,
        }
        assert meter.state_dict()["sums"]
    (learner,) = trainer._parts.learners
    moment = learner.state_dict()["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, state["optimizer"][rank]["state"][0]["exp_avg"])
    assert learner.part.weight.item() == state["model"][f"{rank}.weight"].item()
