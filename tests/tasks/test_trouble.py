"""Runs that learn nothing warn once, and name existing options; other runs do not warn."""

from __future__ import annotations

import re

import pytest
import torch

from cpc_ext.tasks.trouble import trouble
from cpc_ext.training import loop
from cpc_ext.training.config import RunConfig, option
from cpc_ext.training.presets import preset
from cpc_ext.training.registry import MODELS, model_medium
from tests.tasks.test_every_option import sections_of, task_of
from tests.training.conftest import SMALL, TINY

GUESS = {"loss": 4.0, "accuracy": 0.05}
VARIED = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
ALIKE = torch.ones(40, 8)


@pytest.fixture
def config() -> RunConfig:
    return preset("cpc-v1", "textures")


@pytest.mark.parametrize(
    ("means", "features", "expected"),
    [
        ({"loss": 3.99, "accuracy": 0.06}, VARIED, "the loss is 3.99, the accuracy 0.06, and guessing has 4 and 0.05"),
        ({"loss": 4.5, "accuracy": 0.01}, VARIED, "the loss is 4.5"),
        ({"loss": 2.0, "accuracy": 0.5}, ALIKE, "encodings of 40 examples are nearly alike (effective rank 0.00)"),
        ({}, torch.cat([VARIED, ALIKE * torch.nan]), "the encodings of 40 of 80 examples are not finite"),
        ({"loss": 3.99, "accuracy": 0.06}, ALIKE, "guessing has 4 and 0.05; the encodings of 40"),
    ],
)
def test_what_is_said(config, means, features, expected):
    said = trouble(means, GUESS, features, config)
    assert said.startswith("the model learns nothing so far: ")
    assert expected in said
    assert "Try another --lr than 0.001, such as 0.005 or 0.0002" in said


@pytest.mark.parametrize(
    ("means", "features"),
    [
        ({"loss": 3.9, "accuracy": 0.06}, VARIED),
        ({"loss": 3.99, "accuracy": 0.2}, VARIED),
        ({"loss": 1.0, "accuracy": 0.9}, torch.empty(0, 8)),
        ({"loss": 1.0, "accuracy": 0.9}, torch.ones(1, 8)),
        ({}, VARIED),
    ],
)
def test_nothing_is_said_where_something_is_learned(config, means, features):
    assert trouble(means, GUESS, features, config) is None


@pytest.mark.parametrize("model", MODELS)
def test_remedies_are_options_of_the_model(model):
    kinds = {"images": ("textures", "stl10", "folder"), "audio": ("voices", "librispeech")}
    for dataset in kinds[model_medium(model)]:
        remedies = preset(model, dataset).remedies()
        named = re.findall(r"--[a-z-]+", " ".join(remedies))
        assert "--lr" in named
        assert {name.replace("--no-", "--") for name in named} <= {option(name) for name in sections_of(model)}


@pytest.mark.parametrize(("steps", "told"), [(0, True), (50, True), (200, False)])
def test_a_short_warm_up_may_be_what_is_wrong(config, steps, told):
    optimization = config.optimization.model_copy(update={"warmup_steps": steps, "steps": 10000})
    remedies = config.model_copy(update={"optimization": optimization}).remedies()
    assert ("--warmup-steps 500" in remedies) == told


def test_a_short_run_has_room_for_a_short_warm_up(config):
    optimization = config.optimization.model_copy(update={"warmup_steps": 0, "steps": 400})
    assert "--warmup-steps 40" in config.model_copy(update={"optimization": optimization}).remedies()


def assert_guessing_is_told(task):
    """Assert that a task reports guessing, and that the check does not change the model."""
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    task.model.eval()
    assert "the model learns nothing so far: the loss is" in task.trouble(task.guess)
    assert task.trouble({"loss": 0.0, "accuracy": 1.0}) is None
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
def test_every_model_of_encoders_can_be_asked(model):
    if "pixelcnn" in model:
        assert task_of(model).trouble({"loss": 9.0}) is None
    elif model_medium(model) == "images":
        assert_guessing_is_told(task_of(model))


def test_a_run_is_asked_once_and_goes_on_alike(train_with, tmp_path, monkeypatch, capsys):
    def run(name, *options):
        arguments = (*SMALL, *TINY, "--no-evaluate", "--out-dir", tmp_path / name, *options)
        assert train_with(*arguments) == 0
        return capsys.readouterr().err

    assert "learns nothing" not in run("short", "--lr", "1e-9")
    monkeypatch.setattr(loop, "_ASKED", (5, 6))
    said = run("asked", "--lr", "1e-9")
    assert said.count("step 6 of 8: the model learns nothing so far: the loss is 2.8") == 1
    metrics = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("short", "asked")]
    assert [line.split(",")[2:5] for line in metrics[0]] == [line.split(",")[2:5] for line in metrics[1]]
    # A run that goes on was asked before.
    assert "learns nothing" not in run("asked", "--resume", "--steps", "9", "--lr", "1e-9")
