"""A run's length given in minutes: timing of a step, the resulting number of steps, and an otherwise ordinary run."""

from __future__ import annotations

import json
import math

import pytest

from cpc_ext.training import time_budget
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.presets import preset
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.time_budget import filled, seconds_per_step
from tests.training.conftest import SMALL, TINY, logged

# The budget chooses both.
WITHOUT_LENGTH = [
    each
    for pair in zip(TINY[::2], TINY[1::2], strict=True)
    if pair[0] not in ("--steps", "--checkpoint-every")
    for each in pair
]


def budget_of(minutes: float, **optimization):
    config = preset("cpc-v1", "textures")
    length = {"steps": None, "time_budget": minutes, **optimization}
    return config.model_copy(update={"optimization": config.optimization.model_copy(update=length)})


@pytest.mark.parametrize(("budget", "goal"), [(10, 1.0), (600, 12.0), (1e6, 30.0)])
@pytest.mark.parametrize("pace", [1e-4, 0.03, 2.5])
def test_a_step_is_timed_for_a_fiftieth_of_the_budget(budget, goal, pace):
    calls = []

    def take(steps):
        calls.append(steps)
        return steps * (9.0 if len(calls) == 1 else pace)  # The first ones are slow, and do not count.

    assert seconds_per_step(take, budget) == pytest.approx(pace)
    assert goal <= sum(calls[1:]) * pace <= 1.3 * goal + 2 * pace
    assert len(calls) <= 12


def test_a_pace_that_changes_is_measured_for_longer():
    """As of images that come from a disk at first."""
    taken = 0

    def take(steps):
        nonlocal taken
        taken += steps
        return sum(0.1 + 0.3 * math.exp(-number / 60) for number in range(taken - steps, taken))

    assert 0.1 < seconds_per_step(take, 600) < 0.14
    assert taken < 300
    paces = iter([1.0, 3.0] * 1000)
    assert 1.0 <= seconds_per_step(lambda steps: steps * next(paces), 600) <= 3.0
    assert len(list(paces)) > 1900  # Nor for ever.


def test_the_steps_fill_the_minutes():
    config = filled(budget_of(10), 0.1)
    assert config.optimization.steps == 6000
    assert config.optimization.time_budget is None
    assert config.optimization.warmup_steps == 50
    assert config.output.checkpoint_every == 300
    assert config.output.log_every == 20


def test_a_short_run_has_a_short_warmup_and_lines_enough():
    config = filled(budget_of(1, warmup_steps=500), 0.5)
    assert config.optimization.steps == 120
    assert config.optimization.warmup_steps == 12
    assert config.output.checkpoint_every == 60
    assert config.output.log_every == 2


def test_what_was_given_stays_as_it_is():
    short = budget_of(1, warmup_steps=500)
    assert filled(short, 0.5, given={"log_every"}).output.log_every == 20
    assert filled(short, 0.5, given={"log_every"}).optimization.warmup_steps == 12
    assert filled(short, 0.5, given={"warmup_steps"}).optimization.warmup_steps == 500
    assert filled(short, 0.5, given={"warmup_steps"}).output.log_every == 2


def test_a_given_interval_of_the_log_is_the_runs(train_with, tmp_path, short_look):
    options = ("--time-budget", "0.001", "--no-evaluate", "--log_every", "17")
    for number, run in enumerate([(*SMALL, *WITHOUT_LENGTH), ("--config", tmp_path / "0" / "config.yaml")]):
        assert train_with(*run, *options, "--out-dir", tmp_path / str(number)) == 0
        config = load_config(tmp_path / str(number) / "config.yaml")
        assert config.output.log_every == 17
        assert config.optimization.steps < 850
        assert config.optimization.warmup_steps == (0 if number else 2)  # An earlier run's gives way.


def test_a_run_that_goes_on_has_what_is_left():
    config = filled(budget_of(2, warmup_steps=500), 0.5, steps=100, seconds=70.0)
    assert config.optimization.steps == 200
    assert config.optimization.warmup_steps == 500  # It is past it, or else in it.
    assert filled(budget_of(1), 0.5, steps=100, seconds=70.0).optimization.steps == 100


def test_a_budget_of_less_than_a_step_has_one():
    config = filled(budget_of(1e-3), 2.0)
    assert (config.optimization.steps, config.output.log_every, config.output.checkpoint_every) == (1, 1, 15)


@pytest.fixture
def short_look(monkeypatch):
    monkeypatch.setattr(time_budget, "_SHORTEST", 0.05)


def test_a_run_that_fills_a_budget_is_repeated_and_goes_on(train_with, tmp_path, capsys, short_look):
    first, again = tmp_path / "first", tmp_path / "again"
    options = (*SMALL, *WITHOUT_LENGTH, "--time-budget", "0.01", "--no-evaluate")
    assert train_with(*options, "--out-dir", first) == 0
    steps = load_config(first / "config.yaml").optimization.steps
    said = capsys.readouterr().out
    # Messages about slow steps come before these begin.
    assert said.index("loading textures ...") < said.index("measuring how long a step takes ...")
    assert said.index("measuring how long a step takes ...") < said.index(f"{steps} steps of about")
    assert "fill 0.01 minutes" in said
    summary = json.loads((first / "summary.json").read_text())
    assert summary["steps"] == steps == load_checkpoint(first / "checkpoint.pt")["step"]
    assert "probe_accuracy" not in summary
    assert "evaluation" not in summary["phase_seconds"]
    assert read_metrics(first / "metrics.jsonl")[-1]["step"] == steps
    assert (first / "curves.png").is_file()

    # Nothing of the measured steps is left in the run.
    assert train_with("--config", first / "config.yaml", "--out-dir", again) == 0
    assert logged(first) == logged(again)

    assert train_with("--resume", "--out-dir", first, "--time-budget", "0.02") == 0
    summary = json.loads((first / "summary.json").read_text())
    assert summary["steps"] > steps
    assert load_config(first / "config.yaml").optimization.steps == summary["steps"]

    # A shorter budget does not undo finished steps.
    assert train_with("--resume", "--out-dir", first, "--time-budget", "0.001") == 0
    assert json.loads((first / "summary.json").read_text())["steps"] == summary["steps"]
