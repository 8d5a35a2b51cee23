"""Runs of a PixelCNN as a user starts them: files, resumption, and baselines."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cpc_ext.data import Dataset, ImageSet, make_textures
from cpc_ext.data.spread import spread
from cpc_ext.models import GatedPixelCNN, PixelCNNPP
from cpc_ext.programs import training as program
from cpc_ext.tasks import pixel_task
from cpc_ext.tasks.gated_pixelcnn.task import GatedPixelCNNTask
from cpc_ext.tasks.pixel_task import PixelTask
from cpc_ext.tasks.pixelcnn.task import PixelCNNTask
from cpc_ext.tasks.pixelcnn_plus_plus.task import PixelCNNPPTask
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.weight_average import WeightAverage
from tests.training.conftest import SHORT, logged

TINY = ("--layers", "1", "--hidden-channels", "3", "--sample-every", "3", *SHORT)
MODELS = ("pixelcnn", "gated-pixelcnn", "pixelcnn++")


@pytest.fixture(scope="module")
def small_images():
    """Use images of 4x4 pixels, because sampling during training takes time."""

    def part(split, count):
        whole = make_textures(count, split=split, size=16)
        return replace(whole, images=np.ascontiguousarray(whole.images[:, :, ::4, ::4]))

    return Dataset(
        name="textures",
        pretrain=part("pretrain", 44),
        train=part("train", 40),
        test=part("test", 30),
        classes=tuple(map(str, range(10))),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        gray_mean=0.5,
        gray_std=0.2,
    )


@pytest.fixture
def train(monkeypatch, small_images):
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: small_images)
    monkeypatch.setattr(pixel_task, "_SAMPLES", 3)
    return lambda *options: program.main([*TINY, *map(str, options)])


def test_a_part_of_the_images_is_of_all_of_them(train, small_images, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_task, "_HELD_OUT_IMAGES", 10)
    assert train("--model", "pixelcnn", "--out-dir", tmp_path) == 0
    task = PixelCNNTask(load_config(tmp_path / "config.yaml"), small_images, torch.device("cpu"))
    task.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = small_images.test.images
    chosen = torch.from_numpy(images[spread(10, len(images))])
    with torch.no_grad():
        bits = task.model.bits_per_dim(chosen).item()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["heldout_bits_per_dim"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_run_leaves_everything(train, tmp_path, capsys, model):
    assert train("--model", model, "--out-dir", tmp_path) == 0

    records = read_metrics(tmp_path / "metrics.jsonl")
    logged = [record for record in records if "loss" in record]
    observed = [record for record in records if "heldout_bits_per_dim" in record]
    assert [record["step"] for record in logged] == [3, 6, 8]
    assert [record["step"] for record in observed] == [3, 6, 8]
    assert all(set(record) == {"step", "heldout_bits_per_dim"} for record in observed)
    for record in logged:
        assert record["bits_per_dim"] == pytest.approx(record["loss"] / math.log(2), rel=1e-5)
        assert 0 < record["bits_per_dim"] < 11  # A mixture may be worse than 8.

    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("bits_per_dim", "train_bits_per_dim", "static_histogram_bits_per_dim"):
        assert 4 < summary[name] < 11
    assert summary["bits_per_dim"] == pytest.approx(observed[-1]["heldout_bits_per_dim"])  # All 30 are looked at.
    assert summary["model"] == model
    assert f"bits per dimension: {summary['bits_per_dim']:.3f} of the held-out images" in capsys.readouterr().out

    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8
    assert (tmp_path / "best.pt").exists()
    assert load_config(tmp_path / "config.yaml").pixelcnn.layers == 1
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step-{step:06d}.png" for step in (3, 6, 8)
    ]
    for path in (*(tmp_path / "samples").iterdir(), tmp_path / "samples.png", tmp_path / "curves.png"):
        Image.open(path).load()
    assert not (tmp_path / "encoder.safetensors").exists()


def test_model_file_rebuilds_the_model(train, tmp_path, small_images):
    assert train("--model", "gated-pixelcnn", "--class-conditional", "--out-dir", tmp_path) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["description"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert description["model"] == "GatedPixelCNN"
    assert description["image_shape"] == [3, 4, 4]
    assert description["classes"] == list(map(str, range(10)))
    model = GatedPixelCNN(**description["arguments"])
    model.load_state_dict(weights)
    test = small_images.test
    with torch.no_grad():
        bits = model.bits_per_dim(torch.from_numpy(test.images), torch.from_numpy(test.labels))
    assert bits.item() == pytest.approx(json.loads((tmp_path / "summary.json").read_text())["bits_per_dim"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "pixelcnn", "--mirror"),
        ("--model", "gated-pixelcnn", "--class-conditional"),
        ("--model", "gated-pixelcnn", "--precision", "bf16", "--ema-decay", "0.5"),
        ("--model", "pixelcnn++", "--mirror", "--class-conditional", "--dropout", "0.5"),
    ],
)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(train, tmp_path, monkeypatch, options):
    monkeypatch.setattr(PixelTask, "evaluate", lambda task: {})
    monkeypatch.setattr(PixelTask, "save", lambda task, run: None)
    assert train("--out-dir", tmp_path / "whole", *options) == 0

    original, steps = PixelTask.losses, []

    def losses(self, *arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(PixelTask, "losses", losses)
    assert train("--out-dir", tmp_path / "parts", *options) == 130
    torch.manual_seed(12345)
    assert train("--out-dir", tmp_path / "parts", *options, "--resume") == 0

    whole, parts = (load_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("whole", "parts"))
    assert whole["description"] == parts["description"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert whole["task"].keys() == parts["task"].keys()
    for name, value in whole["task"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts["task"][name])), name
    for left, right in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    for step in (3, 6, 8):
        samples = [(tmp_path / run / f"samples/step-{step:06d}.png").read_bytes() for run in ("whole", "parts")]
        assert samples[0] == samples[1]


def test_average_of_the_weights_is_what_is_evaluated(train, tmp_path, small_images):
    options = ("--model", "pixelcnn++", "--ema-decay", "0.8", "--out-dir", tmp_path)
    assert train(*options) == 0
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["task"]["average_updates"] == 8
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["description"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert all(torch.equal(value, state["task"][f"average.{name}"]) for name, value in weights.items())
    assert not all(torch.equal(value, state["model"][name]) for name, value in weights.items())
    model = PixelCNNPP(**description["arguments"]).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        bits = model.bits_per_dim(torch.from_numpy(small_images.test.images)).item()
    assert bits == pytest.approx(json.loads((tmp_path / "summary.json").read_text())["bits_per_dim"], rel=1e-5)


def test_weight_average_is_the_plain_formula():
    model = torch.nn.Linear(2, 1)
    average, expected = WeightAverage(model, 0.4), model.weight.detach().clone()
    for update in range(1, 9):
        torch.nn.init.normal_(model.weight)
        average.update(model)
        decay = min(0.4, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.model.weight, expected)


@pytest.mark.parametrize("data_init", [True, False])
def test_initialization_from_data(small_images, data_init):
    option = "--data-init" if data_init else "--no-data-init"
    config = program.parse(["--model", "pixelcnn++", option, "--device", "cpu", "--batch-size", "8"]).run
    tasks = [PixelCNNPPTask(config, small_images, torch.device("cpu")) for _ in range(2)]
    weights, again = (task.model.state_dict() for task in tasks)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    plain = PixelCNNPPTask(
        program.parse(["--model", "pixelcnn++", "--no-data-init", "--device", "cpu"]).run,
        small_images,
        torch.device("cpu"),
    )
    assert torch.equal(weights["u_init.weight_v"], plain.model.state_dict()["u_init.weight_v"])
    assert torch.equal(weights["u_init.bias"], plain.model.state_dict()["u_init.bias"]) != data_init


def test_images_of_an_odd_size(train, tmp_path, capsys, monkeypatch, small_images):
    cut = {
        part: replace(getattr(small_images, part), images=getattr(small_images, part).images[..., :3])
        for part in ("pretrain", "train", "test")
    }
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: replace(small_images, **cut))
    assert train("--model", "pixelcnn++", "--out-dir", tmp_path) == 1
    assert "--model pixelcnn++ on textures: size must be a multiple of 4 pixels" in capsys.readouterr().err


def test_samples_that_cannot_be_written_do_not_end_the_run(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PixelTask, "save", lambda task, run: None)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixel_task.figures, "save_images", fail)
    assert train("--model", "pixelcnn", "--out-dir", tmp_path) == 0
    assert "could not write what was observed at step 3" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, ("--hidden-channels", "4"), "--hidden-channels 4 is not a multiple of the images' 3 colours"),
        ({"test": None}, (), "--dataset textures has no test images"),
        (
            {"pretrain": ImageSet(np.zeros((9, 3, 4, 4), np.uint8)), "train": None},
            ("--class-conditional",),
            "--class-conditional: the images of textures have no labels",
        ),
    ],
)
def test_what_does_not_fit_the_data_set(train, tmp_path, capsys, monkeypatch, small_images, changes, options, expected):
    changed = replace(small_images, **changes)
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **kwargs: changed)
    assert train("--model", "gated-pixelcnn", "--out-dir", tmp_path / "run", *options) == 1
    assert expected in capsys.readouterr().err


def test_class_conditional_trains_on_labelled_images(small_images):
    unlabelled = replace(small_images, pretrain=ImageSet(small_images.pretrain.images))
    config = program.parse(["--model", "gated-pixelcnn", "--class-conditional", "--device", "cpu"]).run
    assert GatedPixelCNNTask(config, unlabelled, torch.device("cpu")).examples is small_images.train
