"""`python -m cpc_ext.sample`: images of a run, and errors for requests that cannot be met."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpc_ext.data import Dataset, make_textures
from cpc_ext.programs import training as program
from cpc_ext.programs.sample import main
from cpc_ext.tasks import pixel_task
from cpc_ext.training import run_data
from cpc_ext.training.presets import preset

SIDE = 16
# Factor by which figures.save_images enlarges images of 16x16 pixels.
FACTOR = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs: "plain", and "classes" conditioned on ten."""
    folder = tmp_path_factory.mktemp("runs")
    sets = {
        split: make_textures(count, split=split, size=SIDE)
        for split, count in (("pretrain", 20), ("train", 20), ("test", 10))
    }
    dataset = Dataset(
        "textures", **sets, classes=tuple("abcdefghij"), mean=(0.5,) * 3, std=(0.2,) * 3, gray_mean=0, gray_std=1
    )
    options = ("--layers", "1", "--hidden-channels", "3", "--batch-size", "4", "--steps", "1", "--device", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "load_dataset", lambda *arguments, **kwargs: dataset)
        patch.setattr(pixel_task, "_SAMPLES", 1)
        for name, more in (
            ("plain", ("--model", "pixelcnn")),
            ("classes", ("--model", "gated-pixelcnn", "--class-conditional")),
            ("mixture", ("--model", "pixelcnn++", "--class-conditional", "--ema-decay", "0.9")),
        ):
            assert program.main([*options, *more, "--out-dir", str(folder / name)]) == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def run(runs, tmp_path):
    """A function: run("plain") returns a copy of a run's folder, which a test may damage."""

    def copy(name):
        return Path(shutil.copytree(runs / name, tmp_path / name))

    return copy


def sample(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def images_in(path, count):
    """The images of a PNG, [count, SIDE, SIDE, 3]."""
    picture = np.asarray(Image.open(path))
    columns = round(count**0.5)
    step, gap = SIDE * FACTOR + FACTOR, FACTOR
    return np.stack(
        [
            picture[gap + row * step :, gap + col * step :][: SIDE * FACTOR : FACTOR, : SIDE * FACTOR : FACTOR]
            for row, col in (divmod(number, columns) for number in range(count))
        ]
    )


@pytest.mark.parametrize("name", ["plain", "classes", "mixture"])
def test_draws_images(runs, tmp_path, capsys, name):
    assert sample(runs / name, "--n", 4, "--out", tmp_path / "a.png") == 0
    captured = capsys.readouterr()
    assert f"4 images of 16 x 16 pixels are in {tmp_path / 'a.png'}" in captured.out
    assert "16/16" in captured.err  # Rows.
    drawn = images_in(tmp_path / "a.png", 4)
    assert len({image.tobytes() for image in drawn}) == 4
    assert sample(runs / name, "--n", 4, "--out", tmp_path / "b.png") == 0
    assert sample(runs / name, "--n", 4, "--seed", 1, "--out", tmp_path / "c.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_a_full_disk_leaves_what_was_there(runs, tmp_path, capsys):
    (tmp_path / "a.npy").write_text("old")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, unlimited[1]))
    try:
        assert sample(runs / "plain", "--n", 1, "--out", tmp_path / "a.npy") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert f"--out: cannot write {tmp_path / 'a.npy'}" in capsys.readouterr().err
    assert (tmp_path / "a.npy").read_text() == "old"


@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_completes_an_image(run, tmp_path, capsys, name):
    folder = run(name)
    image = make_textures(1, split="test", size=SIDE).images[0].transpose(1, 2, 0)
    Image.fromarray(image).save(tmp_path / "image.png")
    assert sample(folder, "--n", 3, "--complete", tmp_path / "image.png", "--rows", 11) == 0
    assert "resized" not in capsys.readouterr().out
    shown = images_in(folder / "completed.png", 4)
    assert np.array_equal(shown[0], image)
    for completed in shown[1:]:
        assert np.array_equal(completed[:11], image[:11])
        assert not np.array_equal(completed[11:], image[11:])


def test_image_of_another_size_is_resized(run, tmp_path, capsys):
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "image.jpg", quality=100)
    assert sample(run("plain"), "--n", 1, "--complete", tmp_path / "image.jpg") == 0
    assert "has 40 x 30 pixels: resized, and its middle cut out, to the 16 x 16" in capsys.readouterr().out


def test_class_and_temperature(runs, tmp_path):
    options = ("--temperature", 0, "--n", 1)
    assert sample(runs / "classes", "--class", 3, *options, "--out", tmp_path / "a.png") == 0
    assert sample(runs / "classes", "--class", 3, *options, "--seed", 9, "--out", tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_run_that_is_not_finished_is_sampled_from_its_checkpoint(run, capsys, name):
    folder = run(name)
    assert sample(folder, "--n", 1) == 0
    finished = (folder / "sampled.png").read_bytes()
    (folder / "model.safetensors").unlink()
    assert sample(folder, "--n", 1) == 0
    assert (folder / "sampled.png").read_bytes() == finished
    checkpoint = folder / "checkpoint.pt"
    cut = checkpoint.read_bytes()[:-1000]
    checkpoint.unlink()
    assert sample(folder) == 1
    assert "there is neither model.safetensors nor checkpoint.pt" in capsys.readouterr().err
    checkpoint.write_bytes(cut)
    assert sample(folder) == 1
    assert f"the checkpoint {checkpoint} is damaged" in capsys.readouterr().err


def test_model_file_that_is_cut_or_of_another_model(run, capsys):
    folder = run("plain")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert sample(folder) == 1
    assert f"{path} is damaged" in capsys.readouterr().err
    path.write_bytes(whole.replace(b'"PixelCNN\\"', b'"Pixel???\\"').replace(b'\\"PixelCNN\\"', b'\\"Pixel???\\"'))
    assert sample(folder) == 1
    assert f"{path} is of another model than pixelcnn" in capsys.readouterr().err


def test_run_of_another_kind(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(preset("cpc-v1", "textures").to_yaml())
    assert sample(tmp_path) == 1
    assert (
        "is a run of cpc-v1; samples are drawn from gated-pixelcnn or pixelcnn or pixelcnn++" in capsys.readouterr().err
    )
    assert sample(tmp_path / "nowhere") == 1
    assert f"{tmp_path / 'nowhere'} is not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("plain", ("--class", 1), "--class: the model was trained without classes"),
        ("classes", ("--class", 10), "--class: 0 to 9, got 10; they are 0 a, 1 b"),
        ("classes", ("--class", -1), "--class: 0 to 9, got -1"),
        ("plain", ("--n", 0), "--n: at least 1, got 0"),
        ("plain", ("--temperature", -1), "--temperature: at least 0 and finite, got -1"),
        ("plain", ("--rows", 3), "--rows needs --complete"),
        ("plain", ("--complete", "none.png"), "--complete: there is no none.png"),
        ("plain", ("--complete", __file__), "is not an image that can be read"),
        ("plain", ("--complete", __file__, "--rows", 17), "--rows: 0 to 16, the height of the run's images, got 17"),
        ("plain", ("--device", "cuda:63"), "--device cuda:63 is not available"),
        ("plain", ("--n", 1, "--out", "/no/such/folder/a.png"), "--out: cannot write /no/such/folder/a.png"),
        ("plain", ("--n", 1, "--out", "a.jpg"), "--out: expected a name that ends in .png or .npy, got a.jpg"),
    ],
)
def test_what_there_is_not(runs, capsys, name, options, expected):
    device = () if "--device" in options else ("--device", "cpu")
    assert main([str(runs / name), *map(str, options), *device]) == 1
    assert expected in capsys.readouterr().err


def test_program(runs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cpc_ext.sample", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("RUN", "--n", "--class", "--temperature", "--complete", "--rows", "--seed", "--device", "--out"):
        assert name in done.stdout
