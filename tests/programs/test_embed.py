"""`python -m cpc_ext.embed`: from a run and images to a file of encodings with the images' names."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cpc_ext.data import Dataset, ImageSet, make_textures
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.programs import embedding
from cpc_ext.programs import training as program
from cpc_ext.programs.embed import main
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint, save_checkpoint

SIDE = 24
CPC = (
    *("--crop", "20", "--grid-size", "4", "--pred-steps", "1", "--pred-directions", "1", "--batch-size", "4"),
    *("--warmup-steps", "0", "--neg-samples", "4"),
)
SIMCLR = (
    *("--model", "simclr", "--view-size", "16", "--center-scale", "1.5"),
    *("--projection-channels", "4", "--batch-size", "4"),
)
# Distinct, in an order of folders that os.walk would give otherwise, and in three formats.
NAMES = ("b/1.png", "b.png", "a/c/2.bmp", "a/3.tif", "z.png")


@pytest.fixture(scope="module")
def dataset():
    # Statistics as no folder of a test has them.
    return Dataset(
        "textures",
        pretrain=make_textures(20, split="pretrain", size=SIDE),
        train=None,
        test=make_textures(10, split="test", size=SIDE),
        classes=(),
        mean=(0.1, 0.2, 0.3),
        std=(0.5,) * 3,
        gray_mean=0.2,
        gray_std=0.6,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    """Folders of finished runs: "cpc" and "simclr"."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset)
        for name, options in (("cpc", CPC), ("simclr", SIMCLR)):
            more = ("--steps", "1", "--device", "cpu", "--precision", "fp32", "--out-dir", str(folder / name))
            assert program.main([*options, *more]) == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path):
    """A folder with the first test images of the data set under NAMES."""
    root = tmp_path / "images"
    pixels = make_textures(len(NAMES), split="test", size=SIDE).images.transpose(0, 2, 3, 1)
    for name, image in zip(NAMES, pixels, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def embed(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def expected(folder, dataset, names, method="features"):
    """Compute the run's encodings of the images with these names, one at a time."""
    task = EncoderRun.open(folder, torch.device("cpu")).trained(dataset)
    pixels = torch.from_numpy(dataset.test.images[[NAMES.index(name) for name in names]].copy())
    return torch.cat([getattr(task, method)(task.model, image[None]) for image in pixels])


@pytest.mark.parametrize("name", ["cpc", "simclr"])
def test_npy_with_names(runs, images, dataset, tmp_path, capsys, name):
    assert embed(runs / name, "--data-dir", images, "--out", tmp_path / "x.npy") == 0
    names = json.loads((tmp_path / "x.names.json").read_text())
    assert names == sorted(NAMES)
    features = np.load(tmp_path / "x.npy")
    assert features.dtype == np.float32
    assert np.allclose(features, expected(runs / name, dataset, names), atol=1e-5)
    assert f"encodings of 5 images, 5 x {features.shape[1]}, are in" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "grid"), [("cpc", 4), ("simclr", 1)])
def test_safetensors_of_every_patch(runs, images, dataset, tmp_path, name, grid):
    assert embed(runs / name, "--data-dir", images, "--per-patch", "--out", tmp_path / "x.safetensors") == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
        features = file.get_tensor("features")
    assert names == sorted(NAMES)
    assert features.shape[2:] == (grid, grid)
    assert torch.allclose(features, expected(runs / name, dataset, names, "encodings"), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("x")] == ["x.safetensors"]


def test_more_images_than_a_batch(runs, images, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCH", 2)
    assert embed(runs / "cpc", "--data-dir", images, "--out", tmp_path / "x.npy") == 0
    names = json.loads((tmp_path / "x.names.json").read_text())
    assert np.allclose(np.load(tmp_path / "x.npy"), expected(runs / "cpc", dataset, names), atol=1e-5)


def test_file_that_is_no_image_is_left_out(runs, images, dataset, tmp_path, capsys):
    (images / "a" / "0.jpg").write_bytes(b"no image")
    (images / "notes.txt").write_text("not looked at")
    (images / ".hidden.png").write_bytes(b"neither")
    assert embed(runs / "cpc", "--data-dir", images, "--out", tmp_path / "x.npy") == 0
    errors = capsys.readouterr().err
    assert "left out 1 images:\n    1: holds no image that Pillow recognises (a/0.jpg)" in errors
    names = json.loads((tmp_path / "x.names.json").read_text())
    assert names == sorted(NAMES)
    assert np.allclose(np.load(tmp_path / "x.npy"), expected(runs / "cpc", dataset, names), atol=1e-5)


def test_images_of_other_sizes(runs, tmp_path):
    """An even image is the same at every size: smaller than the crop, larger, not square, grey."""
    root = tmp_path / "images"
    root.mkdir()
    for name, size in (("a", (SIDE, SIDE)), ("b", (7, 5)), ("c", (90, 200))):
        Image.new("RGB", size, (60, 60, 60)).save(root / f"{name}.png")
    Image.new("L", (30, 30), 60).save(root / "d.png")
    assert embed(runs / "simclr", "--data-dir", root, "--out", tmp_path / "x.npy") == 0
    features = np.load(tmp_path / "x.npy")
    assert np.allclose(features, features[:1], atol=1e-5)


def test_a_run_of_one_channel_sees_a_folder_in_grey(images, dataset, tmp_path, monkeypatch):
    files = [Image.open(images / name).convert("L") for name in NAMES]
    gray = replace(
        dataset,
        pretrain=ImageSet(images=np.ascontiguousarray(dataset.pretrain.images[:, 1:2])),
        test=ImageSet(images=np.stack([np.asarray(file)[None] for file in files])),
        mean=(0.2,),
        std=(0.6,),
    )
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: gray)
    run = tmp_path / "run"
    more = ("--steps", "1", "--device", "cpu", "--precision", "fp32", "--out-dir", str(run))
    assert program.main([*SIMCLR, *more]) == 0
    assert embed(run, "--data-dir", images, "--out", tmp_path / "x.npy") == 0
    names = json.loads((tmp_path / "x.names.json").read_text())
    # Pillow rounds some of its grey down where the nearest is above.
    assert np.allclose(np.load(tmp_path / "x.npy"), expected(run, gray, names), atol=1e-3)


def test_image_size(runs, images, tmp_path, capsys):
    def features(*options):
        assert embed(runs / "cpc", "--data-dir", images, "--out", tmp_path / "x.npy", *options) == 0
        return np.load(tmp_path / "x.npy")

    assert np.array_equal(features(), features("--image-size", SIDE))
    assert not np.allclose(features(), features("--image-size", 40))
    assert embed(runs / "cpc", "--data-dir", images, "--image-size", 12) == 1
    assert f"--crop 20 is larger than the images of {images}, 12 pixels" in capsys.readouterr().err


def test_another_data_set(runs, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "load_dataset", lambda *arguments, **options: dataset)
    options = ("--dataset", "textures", "--split", "test", "--out", tmp_path / "x.npy")
    assert embed(runs / "cpc", *options) == 0
    assert json.loads((tmp_path / "x.names.json").read_text()) == [f"test/{number}" for number in range(10)]
    assert np.allclose(np.load(tmp_path / "x.npy")[: len(NAMES)], expected(runs / "cpc", dataset, NAMES), atol=1e-5)


@pytest.fixture
def array(tmp_path, dataset, monkeypatch):
    """Seventeen images in one array without labels, a part of which is held out for testing."""
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    images = dataset.pretrain.images[:17]
    np.save(tmp_path / "photos.npy", images.transpose(0, 2, 3, 1))
    return images


def of_images(folder, dataset, images):
    task = EncoderRun.open(folder, torch.device("cpu")).trained(dataset)
    return task.features(task.model, torch.from_numpy(np.ascontiguousarray(images)))


@pytest.mark.filterwarnings("ignore:.*no images to test on")
def test_all_rows_of_an_array_in_their_order(runs, dataset, array, tmp_path):
    options = ("--dataset", "npy", "--data-dir", tmp_path / "photos.npy", "--out", tmp_path / "x.npy")
    assert embed(runs / "simclr", *options) == 0
    assert json.loads((tmp_path / "x.names.json").read_text()) == [f"photos[{row}]" for row in range(17)]
    assert np.allclose(np.load(tmp_path / "x.npy"), of_images(runs / "simclr", dataset, array), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no images to test on")
def test_an_array_of_another_size_is_brought_to_the_runs(runs, tmp_path, monkeypatch, capsys):
    """As a folder's images are; an even image is the same at every size, and 12 pixels are less than the crop."""
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    features = []
    for side in (12, SIDE, 60):
        np.save(tmp_path / f"{side}.npy", np.full((3, side, side, 3), 60, np.uint8))
        options = ("--dataset", "npy", "--data-dir", tmp_path / f"{side}.npy", "--out", tmp_path / "x.npy")
        assert embed(runs / "cpc", *options) == 0
        features.append(np.load(tmp_path / "x.npy"))
        assert features[-1].shape[0] == 3
    assert np.allclose(features, features[0][:1], atol=1e-5)
    assert embed(runs / "cpc", *options, "--image-size", "12") == 1
    assert "--crop 20 is larger than the images of npy, 12 pixels" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*no images to test on")
def test_a_split_that_is_not_there_names_those_that_are(runs, array, tmp_path, capsys):
    options = ("--dataset", "npy", "--data-dir", tmp_path / "photos.npy", "--out", tmp_path / "x.npy")
    assert embed(runs / "simclr", *options, "--split", "train") == 1
    assert "--split: npy has no train images, but pretrain, test, all" in capsys.readouterr().err
    assert embed(runs / "simclr", *options, "--split", "test") == 0
    names = json.loads((tmp_path / "x.names.json").read_text())
    assert 0 < len(names) < 17


def test_all_parts_of_arrays_without_names(runs, dataset, tmp_path):
    """They are mapped, and nothing is held out."""
    images = dataset.pretrain.images[:9].transpose(0, 2, 3, 1)
    np.savez(tmp_path / "x.npz", x_train=images[:6], x_test=images[6:], y_train=np.arange(6) % 2, y_test=[0, 1, 1])
    options = ("--dataset", "npy", "--data-dir", tmp_path / "x.npz", "--out", tmp_path / "x.npy")
    assert embed(runs / "simclr", *options) == 0
    names = json.loads((tmp_path / "x.names.json").read_text())
    assert names == [*(f"train/{row}" for row in range(6)), *(f"test/{row}" for row in range(3))]
    expected = of_images(runs / "simclr", dataset, dataset.pretrain.images[:9])
    assert np.allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-5)


def test_run_from_before_checkpoints_knew_the_statistics(runs, images, dataset, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(runs / "simclr", tmp_path / "run"))
    assert embed(folder, "--data-dir", images) == 0
    features = np.load(folder / "features.npy")
    state = load_checkpoint(folder / "checkpoint.pt")
    del state["format"], state["description"]
    save_checkpoint(folder / "checkpoint.pt", state)
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset)
    assert embed(folder, "--data-dir", images) == 0
    assert np.array_equal(np.load(folder / "features.npy"), features)


def test_full_disk_leaves_what_was_there(runs, images, tmp_path, capsys):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("x.npy", "x.safetensors"):
        (tmp_path / name).write_text("old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        try:
            assert embed(runs / "cpc", "--data-dir", images, "--out", tmp_path / name) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert f"--out: cannot write {tmp_path / name}" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.npy", "x.safetensors"]


def test_ctrl_c_leaves_nothing(runs, images, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "_encode", interrupted)
    assert embed(runs / "cpc", "--data-dir", images, "--out", tmp_path / "x.npy") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "--data-dir: name the folder of images"),
        (("--data-dir", "/no/such/folder"), "/no/such/folder: no such folder"),
        (("--data-dir", "EMPTY"), "found no image"),
        (("--data-dir", "BROKEN"), "none of the 1 images could be read"),
        (("--data-dir", __file__), "test_embed.py: a file, where a folder of images is expected; --dataset says"),
        (("--data-dir", "IMAGES", "--split", "test"), "--dataset folder takes all images below --data-dir"),
        (("--data-dir", "IMAGES", "--out", "x.txt"), "--out: expected a name that ends in .npy or .safetensors"),
        (("--data-dir", "IMAGES", "--out", "/no/such/folder/x.npy"), "--out: cannot write /no/such/folder/x.npy"),
        (("--data-dir", "IMAGES", "--image-size", "0"), "--image-size: at least 1, got 0"),
        (("--data-dir", "IMAGES", "--layer", "context"), "--layer would have no effect: it is of runs on speech"),
        (("--data-dir", "IMAGES", "--split", "test"), "--split would have no effect: --dataset folder takes all"),
        (("--dataset", "cifar10", "--data-dir", "EMPTY"), "--dataset cifar10: "),
        (
            ("--dataset", "cifar10", "--image-size", "32"),
            "--image-size: the images of cifar10 have a size of their own",
        ),
        (("--data-dir", "IMAGES", "--device", "cuda:63"), "--device cuda:63 is not available"),
    ],
)
def test_what_there_is_not(runs, images, tmp_path, capsys, options, expected):
    places = {"IMAGES": images, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    for place in places.values():
        place.mkdir(exist_ok=True)
    (tmp_path / "broken" / "x.png").write_bytes(b"")
    device = () if "--device" in options else ("--device", "cpu")
    assert main([str(runs / "cpc"), *(str(places.get(each, each)) for each in options), *device]) == 1
    assert expected in capsys.readouterr().err


def test_program():
    done = subprocess.run([sys.executable, "-m", "cpc_ext.embed", "--help"], capture_output=True, text=True, check=True)
    for name in ("RUN", "--data-dir", "--dataset", "--split", "--image-size", "--per-patch", "--device", "--out"):
        assert name in done.stdout
