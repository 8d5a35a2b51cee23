"""Opening a run for evaluation: its device and its images; and cached encodings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpc_ext.data import ImageSet
from cpc_ext.evaluation import encoder_run
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.evaluation.encodings_cache import cached_encodings
from cpc_ext.training import digests as digests_module
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.data_record import data_record
from cpc_ext.training.digests import images_digest, weights_digest
from cpc_ext.training.errors import TrainingError
from tests.tasks.test_every_option import config_of, dataset_of, noise
from tests.training.conftest import new_run

CPU = torch.device("cpu")
DATA = replace(
    dataset_of(noise()), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), gray_mean=0.7, gray_std=0.8, name="textures"
)


@pytest.fixture
def folder(tmp_path):
    return new_run(tmp_path / "run", config_of("cpc-v1", precision="bf16", device="cpu", data_dir="there"), DATA)


def test_a_run_is_moved_to_a_device_and_its_data(folder, tmp_path, monkeypatch):
    run = EncoderRun.open(folder, CPU)
    assert (run.config.compute.device, run.config.compute.precision) == ("cpu", "bf16")
    assert str(run.config.data.data_dir) == "there"
    assert run.dir.path == folder
    assert run.state["step"] == 0
    monkeypatch.setattr(encoder_run, "default_precision", {"meta": "fp16"}.__getitem__)
    moved = EncoderRun.open(folder, torch.device("meta"), data_dir=tmp_path)
    assert (moved.config.compute.device, moved.config.compute.precision) == ("meta", "fp16")
    assert moved.config.data.data_dir == tmp_path
    assert moved.config.view == run.config.view
    asked = []
    monkeypatch.setattr(encoder_run, "load_data", lambda config, record: asked.append(config) or DATA)
    assert (moved.dataset(), asked) == (DATA, [moved.config])


def test_data_that_are_others_now_are_said(folder, monkeypatch, capsys):
    """A relative --data-dir may lead elsewhere. What normalises the images is what their encoder has learned with."""
    data = dataset_of(noise(12))
    others = {
        "the same": (data, ""),
        "labelled": (replace(data, pretrain=ImageSet(data.pretrain.images[:3])), ""),
        "fewer": (replace(data, pretrain=ImageSet(noise(5)), train=None), "12 images then, 5 now"),
    }
    run = EncoderRun.open(folder, CPU)
    run.state["data"] = data_record(data.train)
    for dataset, said in others.values():
        monkeypatch.setattr(encoder_run, "load_data", lambda config, record, dataset=dataset: dataset)
        found = run.dataset()
        assert found.pretrain is dataset.pretrain
        assert (found.mean, found.std, found.gray_mean, found.gray_std) == (DATA.mean, DATA.std, 0.7, 0.8)
        warning = "was trained on other data than are there now, perhaps on some that are tested on: "
        assert capsys.readouterr().err == (f"warning: {folder} {warning}{said}\n" if said else "")
    del run.state["data"]
    run.dataset()
    assert capsys.readouterr().err == ""


def test_weights_of_the_checkpoint_and_of_seeds(folder):
    run = EncoderRun.open(folder, CPU)
    trained = run.trained(DATA)
    saved = load_checkpoint(folder / "checkpoint.pt")["model"]
    assert all(torch.equal(value, saved[name]) for name, value in trained.model.state_dict().items())
    digests = [weights_digest(run.untrained(DATA, seed=seed).model) for seed in (0, 1, 1, 2)]
    assert digests[1] == digests[2] == weights_digest(trained.model)  # The run's weights are those of seed 1.
    assert len(set(digests)) == 3
    with pytest.raises(TrainingError, match=r"^--crop 24 is larger than the images of textures, 8 pixels$"):
        run.untrained(dataset_of(noise(2, 8)), seed=0)
    run.state["model"] = {}
    with pytest.raises(TrainingError, match=r"checkpoint\.pt is of another model than .*config\.yaml describes$"):
        run.trained(DATA)


def test_images_of_other_channels_are_told(tmp_path):
    """As where the run was made of a checkpoint, whose images the data set does not have."""
    config = config_of("cpc-v1", device="cpu", gray=False, patch_norm=False)
    run = EncoderRun.open(new_run(tmp_path / "run", config, DATA), CPU)
    gray = replace(dataset_of(noise()[:, :1]), mean=(0.5,), std=(0.2,))
    shapes = r"size mismatch for encoder\.\S+: .*\[\d+, 3, .*\[\d+, 1, .*[^.]"
    with pytest.raises(TrainingError, match=rf"describes for textures \({shapes}\)$"):
        run.trained(gray)


def test_digest_of_weights():
    """Names, types, shapes and values count."""
    models = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 2), torch.nn.Linear(2, 3).half()]
    models += [torch.nn.Linear(2, 3, bias=False), torch.nn.Sequential(torch.nn.Linear(2, 3)), torch.nn.Linear(2, 3)]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    models[-1].bias.data[2] = 1
    digests = [weights_digest(model) for model in models]
    assert len(set(digests)) == len(models)
    assert {len(digest) for digest in digests} == {32}
    assert all(set(digest) <= set("0123456789abcdef") for digest in digests)
    assert weights_digest(models[0].to(memory_format=torch.preserve_format)) == digests[0]


def test_other_images_get_the_statistics_of_the_runs(folder, monkeypatch):
    run = EncoderRun.open(folder, CPU)
    images = ImageSet(noise(1, 40))
    expected = {"image_shape": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert run.statistics() == {**expected, "gray_mean": 0.7, "gray_std": 0.8}
    stand_in = run.stand_in("folder", images)
    assert stand_in.pretrain.images is stand_in.train.images is images.images
    other = replace(DATA, name="folder", pretrain=stand_in.train, train=stand_in.train, test=stand_in.train, classes=())
    assert vars(stand_in) == vars(other)
    # A checkpoint of before they were kept.
    monkeypatch.setattr(EncoderRun, "dataset", lambda run: DATA)
    del run.state["description"]
    found = run.statistics()
    assert {name: list(value) if name in expected else value for name, value in found.items()} == {
        **expected,
        "gray_mean": 0.7,
        "gray_std": 0.8,
    }


@pytest.mark.parametrize(
    ("model", "options"), [("supcon", {}), ("greedy-infomax", {"objective": "supervised"}), ("cpc-v2", {})]
)
def test_encoding_needs_no_labels(tmp_path, model, options):
    """Encodings of images without labels are those that the run's own labelled images would have."""
    data = replace(DATA, classes=("a", "b", "c"))
    run = EncoderRun.open(new_run(tmp_path / "run", config_of(model, device="cpu", **options), data), CPU)
    images = torch.from_numpy(noise(3, 32))
    for others in (ImageSet(np.empty((0, 3, 32, 32), np.uint8)), ImageSet(images.numpy())):
        task = run.trained(run.stand_in("folder", others))
        own = run.trained(data)
        assert torch.equal(task.features(task.model, images), own.features(own.model, images))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"image_shape": [3, 32]}, {"image_shape": [3, 32, 0]}, {"image_shape": [3, 32.0, 32]}, {"image_shape": 3}),
        *({"mean": [0.1]}, {"std": [0.1]}, {"mean": [0.1, 0.2, "0.3"]}, {"gray_std": None}, {"image_shape": None}),
        *({"mean": [0.1], "std": [0.1]}, {"std": [0.1, 0.2, True]}),
    ],
)
def test_descriptions_of_no_images(folder, wrong):
    run = EncoderRun.open(folder, CPU)
    run.state["description"] |= wrong
    with pytest.raises(TrainingError, match=r"^the checkpoint .*checkpoint\.pt describes no images: got "):
        run.statistics()
    for name in ("image_shape", "std", "gray_mean", "gray_std"):
        run = EncoderRun.open(folder, CPU)
        del run.state["description"][name]
        with pytest.raises(TrainingError, match="describes no images"):
            run.statistics()


def test_one_pixel_is_an_image(folder):
    run = EncoderRun.open(folder, CPU)
    run.state["description"] |= {"image_shape": [3, 1, 1], "gray_mean": 1}
    assert run.statistics()["image_shape"] == [3, 1, 1]


# Encodings that are kept.


def test_encodings_are_kept_with_their_origin(tmp_path):
    path, calls = tmp_path / "x.safetensors", []

    def encodings(origin, count=4, value=1.0):
        def compute():
            calls.append(origin)
            return torch.full((6, count), value).T  # Not contiguous.

        return cached_encodings(path, origin, count, compute)

    first = encodings({"a": "1", "b": "2"})
    assert torch.equal(encodings({"b": "2", "a": "1"}, value=2.0), first)
    assert len(calls) == 1
    assert torch.equal(load_file(path)["features"], first)
    assert encodings({"a": "1", "b": "3"}, value=2.0)[0, 0] == 2
    assert encodings({"a": "1", "b": "3"}, count=5, value=3.0).shape == (5, 6)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "features", [torch.zeros(4), torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, 1)]
)
def test_encodings_of_another_kind_are_made_anew(tmp_path, features):
    path = tmp_path / "x.safetensors"
    cached_encodings(path, {}, 4, lambda: torch.ones(4, 2))
    save_file({"features": features}, path, {"origin": "{}"})
    assert torch.equal(cached_encodings(path, {}, 4, lambda: torch.ones(4, 2)), torch.ones(4, 2))
    assert torch.equal(load_file(path)["features"], torch.ones(4, 2))
    save_file({"features": torch.zeros(4, 2)}, path)  # Without metadata.
    assert torch.equal(cached_encodings(path, {}, 4, lambda: torch.ones(4, 2)), torch.ones(4, 2))


def test_encodings_that_cannot_be_kept_are_there(tmp_path, capsys):
    path = tmp_path / "no" / "x.safetensors"
    assert torch.equal(cached_encodings(path, {}, 1, lambda: torch.ones(1, 2)), torch.ones(1, 2))
    assert f"warning: could not keep the encodings in {path} (No such file or directory)" in capsys.readouterr().err


def test_digest_of_images(monkeypatch):
    monkeypatch.setattr(digests_module, "_CHUNK", 2)
    pixels = noise(5, 4)
    images = ImageSet(pixels, np.arange(5))
    digests = {
        images_digest(images),
        images_digest(ImageSet(pixels)),
        images_digest(ImageSet(pixels, np.arange(5) % 4)),
    }
    for number in range(5):
        other = pixels.copy()
        other[number, 2, 3, 3] ^= 1
        digests.add(images_digest(ImageSet(other)))
    digests.add(images_digest(ImageSet(pixels.reshape(5, 3, 2, 8))))
    assert len(digests) == 9
    assert {len(digest) for digest in digests} == {32}
    monkeypatch.setattr(digests_module, "_CHUNK", 100)
    assert images_digest(images) in digests
