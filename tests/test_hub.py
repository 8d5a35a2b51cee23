"""Models saved and loaded as huggingface_hub does it, in local folders: no network is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cpc_ext import hub
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.interop import load_reference
from cpc_ext.programs.convert import main as convert
from cpc_ext.training.config import load_config
from cpc_ext.training.errors import TrainingError
from tests.training.conftest import *  # noqa: F403 - fixtures
from tests.training.conftest import SHORT, SMALL

TWO_VIEWS = ("--view-size", "24", "--center-scale", "1.5", "--projection-channels", "8")
RUNS = {
    # Probes during training are a list in summary.json, which is not a result.
    "cpc-v1": (
        *("--crop", "24", "--grid-size", "5", "--pred-steps", "2", "--context-layers", "1", "--probe-every", "4"),
    ),
    "simclr": ("--model", "simclr", *TWO_VIEWS),
    "moco": ("--model", "moco", "--queue-size", "24", *TWO_VIEWS),
    "pixelcnn": ("--model", "pixelcnn", "--layers", "1", "--hidden-channels", "6"),
}
CHECKPOINTS = Path(__file__).parent / "interop" / "checkpoints"


@pytest.fixture
def run(train_with, tmp_path):
    """Trains a run of a model and gives its folder."""

    def train(model):
        small = SMALL if model != "pixelcnn" else ("--dataset", "textures")
        assert train_with(*small, *RUNS[model], *SHORT, "--precision", "fp32", "--out-dir", tmp_path / "run") == 0
        return tmp_path / "run"

    return train


@pytest.mark.parametrize("model", ["cpc-v1", "simclr"])
def test_encoder(model, run, tiny_dataset, tmp_path):
    """Its features are those that the run's own probe sees."""
    folder = run(model)
    saved = hub.Encoder.of_run(folder)
    saved.save_pretrained(tmp_path / "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = hub.Encoder.from_pretrained(str(tmp_path / "hub"))
    assert not loaded.training

    task = EncoderRun.open(folder, torch.device("cpu")).trained(tiny_dataset)
    images = torch.from_numpy(tiny_dataset.test.images[:3])
    with torch.no_grad():
        features = loaded(images)
        torch.testing.assert_close(features, task.features(task.model, images))
        torch.testing.assert_close(loaded.encodings(images), task.encodings(task.model, images))
    # Again from what was loaded: the same files, the record included.
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "README.md"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "hub" / name).read_text()


def test_an_encoder_whose_last_modules_are_untrained_is_refused(train_with, tmp_path):
    """What follows the trained modules has the weights that a seed drew, and features of it tell nothing of the run."""
    folder = tmp_path / "run"
    options = ("--model", "greedy-infomax", "--modules", "3", "--crop", "24", "--grid-size", "5", "--pred-steps", "2")
    for module, trained in ((0, "1"), (1, "2"), (2, None)):
        more = () if module == 0 else ("--resume-from", tmp_path / f"run{module - 1}")
        folder = tmp_path / f"run{module}"
        taken = (*SMALL, *options, *SHORT, "--train-module", str(module), *more, "--out-dir", folder)
        assert train_with(*taken, "--no-evaluate") == 0
        with safe_open(folder / "encoder.safetensors", "pt") as file:
            assert file.metadata().get("modules") == trained
        if trained is None:
            assert hub.Encoder.of_run(folder).num_features == 32
        else:
            with pytest.raises(TrainingError, match=rf"run{module} trained module {module} and not those after it"):
                hub.Encoder.of_run(folder)


@pytest.mark.parametrize("model", RUNS)
def test_whole_model(model, run, tmp_path):
    folder = run(model)
    hub.Model.of_run(folder).save_pretrained(tmp_path / "hub")
    loaded = hub.Model.from_pretrained(tmp_path / "hub")
    expected = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    assert {name.removeprefix("model.") for name in weights} <= expected.keys()
    if model == "pixelcnn":
        images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
        assert torch.equal(loaded.model.nats(images), hub.Model.of_run(folder).model.nats(images))


def test_model_of_sound(tmp_path):
    checkpoint = CHECKPOINTS / "cpc_audio_lstm_linear"
    folder = tmp_path / "run"
    arguments = [str(checkpoint), "--source", "cpc-audio", "--out", str(folder), "--dataset", "voices"]
    assert convert(arguments) == 0
    hub.Model.of_run(folder).save_pretrained(tmp_path / "hub")
    loaded = hub.Model.from_pretrained(tmp_path / "hub").model
    waveforms = torch.randn(1, 1, 3200, generator=torch.Generator().manual_seed(0))
    expected = load_reference(checkpoint, "cpc-audio")
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(waveforms), expected.encode(waveforms))
    with pytest.raises(TrainingError, match=r"holds no encoder\.safetensors"):
        hub.Encoder.of_run(folder)


def test_card_and_config(run, tmp_path):
    """The recipe and the results are there, the machine's paths are not."""
    folder = run("cpc-v1")
    hub.Encoder.of_run(folder).save_pretrained(tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: cpc_ext" in card
    assert "# ResNetV2Encoder of CPC on textures" in card
    summary = json.loads((folder / "summary.json").read_text())
    assert f"| probe accuracy | {summary['probe_accuracy']:.4g} |" in card
    assert "model: cpc-v1\n" in card
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["kind"] == "ResNetV2Encoder"
    assert str(tmp_path) not in card + json.dumps(config)
    assert "  device: cpu\n" in config["record"]["recipe"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config["record"]["recipe"])
    assert load_config(recipe).cpc == load_config(folder / "config.yaml").cpc


def test_encoder_without_a_run(tmp_path):
    arguments = {"blocks": [1], "channels": [4], "stem_channels": 4, "stem": "cifar", "norm": "batch"}
    encoder = hub.Encoder("ResNetV2Encoder", arguments, {"patch_size": 8, "stride": 4, "crop": [16, 16]})
    encoder.save_pretrained(tmp_path)
    images = torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8)
    loaded = hub.Encoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(images), encoder.eval()(images))
    assert loaded.encodings(images).shape == (2, 4, 3, 3)
    # As torchvision's ToTensor has them, before a classifier of features of so many channels.
    classifier = torch.nn.Sequential(loaded, torch.nn.Linear(loaded.num_features, 5))
    assert classifier(images.float() / 255).shape == (2, 5)
    assert torch.equal(loaded(images.float() / 255), loaded(images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 20, 20), r"expected \[B, C, H, W\], got \[3, 20, 20\]"),
        (torch.zeros(2, 1, 20, 20), "trained on 3 channels, got 1"),
        (torch.linspace(-2, 2, 2400).reshape(2, 3, 20, 20), "floating point is from 0 to 1, got -2 to 2; the encoder"),
        (torch.full((2, 3, 20, 20), torch.nan), "floating point is from 0 to 1, got nan"),
        (torch.full((2, 3, 20, 20), 255.0), "floating point is from 0 to 1, got 255 to 255"),
    ],
)
def test_images_that_it_was_not_trained_for(images, message):
    """Clamped to 0..1 they would give features of something else."""
    arguments = {"blocks": [1], "channels": [4], "stem_channels": 4, "stem": "cifar"}
    view = {"patch_size": 8, "stride": 4, "mean": [0.5] * 3, "std": [0.2] * 3}
    encoder = hub.Encoder("ResNetV2Encoder", arguments, view).eval()
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        encoder(images)
    assert encoder(torch.rand(2, 3, 20, 20) * 1.1 - 0.05).shape == (2, 4)
    gray = hub.Encoder(
        "ResNetV2Encoder", {**arguments, "in_channels": 1}, {**view, "gray": True, "mean": [0.5], "std": [1]}
    )
    assert gray.eval()(torch.rand(2, 3, 20, 20)).shape == (2, 4)


@pytest.mark.parametrize("view", [{"patch_size": 8, "stride": 4}, {"size": 16}])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_images_of_other_types(view, dtype):
    arguments = {"blocks": [1], "channels": [4], "stem_channels": 4, "stem": "cifar"}
    with pytest.raises(TypeError, match=r"images must be uint8.*, got (torch\.)?(int64|bool)"):
        hub.Encoder("ResNetV2Encoder", arguments, view)(torch.ones(2, 3, 20, 20, dtype=dtype))


def test_what_is_wrong_is_said(run, tmp_path):
    arguments = {"blocks": [1], "channels": [4], "stem_channels": 4, "stem": "cifar"}
    view = {"patch_size": 8, "stride": 4}
    with pytest.raises(ValueError, match=r"kind must be an encoder of images of cpc_ext\.models, got 'CPC'"):
        hub.Encoder("CPC", arguments, view)
    with pytest.raises(ValueError, match="arguments or view are of another version"):
        hub.Encoder("ResNetV2Encoder", arguments, {**view, "colour": 1})
    with pytest.raises(TrainingError, match="is not a run's folder"):
        hub.Encoder.of_run(tmp_path)
    with pytest.raises(TrainingError, match="is not a run's folder"):
        hub.Model.of_run(tmp_path)
    with pytest.raises(ValueError, match=r"options are of another version of cpc_ext: .*colour"):
        hub.Model({"model": "cpc-v1", "colour": 1})

    folder = tmp_path / "hub"
    hub.Encoder("ResNetV2Encoder", arguments, view).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"holds no Model of cpc_ext: its config\.json has no 'options'"):
        hub.Model.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    wide = {**config, "arguments": {**arguments, "channels": [8]}}
    for change in (
        lambda path: (path / "config.json").write_text(json.dumps(wide)),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100]),
    ):
        damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
        change(damaged)
        with pytest.raises(ValueError, match="damaged: its weights are missing, damaged, or of another model"):
            hub.Encoder.from_pretrained(damaged)
        shutil.rmtree(damaged)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no Encoder of cpc_ext"):
        hub.Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "given", ["encodr", "./encodr", "~/encodr", "runs/a/encodr", "/runs", "here/encodr", Path("a/b")]
)
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(given, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **given: asked.append(given["repo_id"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    for kind in (hub.Encoder, hub.Model):
        with pytest.raises(ValueError, match=rf"there is no folder {given}[,;].* on the Hub are called OWNER/NAME"):
            kind.from_pretrained(given)
    assert not asked
    (tmp_path / "here" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"here/model.safetensors is a file: give the folder that holds it"):
        hub.Encoder.from_pretrained("here/model.safetensors")
    with pytest.raises(ValueError, match="owner/encodr holds no Encoder"):
        hub.Encoder.from_pretrained("owner/encodr")
    assert asked == ["owner/encodr"]


def test_the_home_folder_has_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = {"blocks": [1], "channels": [4], "stem_channels": 4, "stem": "cifar"}
    hub.Encoder("ResNetV2Encoder", arguments, {"patch_size": 8, "stride": 4}).save_pretrained(tmp_path / "encoder")
    assert hub.Encoder.from_pretrained("~/encoder").num_features == 4
