"""Codes in NumPy's files: unchanged values of any size, labels and parts, training on them and sampling them."""

from __future__ import annotations

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.programs import sample, training


def codes_of(count: int, levels: int = 700, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, levels, (count, side, side))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.int16])
def test_codes_keep_their_values(tmp_path, dtype):
    codes = codes_of(40).astype(dtype)
    np.save(tmp_path / "codes.npy", codes)
    data = load_dataset("codes", tmp_path / "codes.npy")
    assert data.image_shape == (1, 6, 6)
    assert data.classes == ()
    assert data.pretrain.images.dtype == np.int32
    # A tenth is held out.
    assert (len(data.pretrain), len(data.test)) == (38, 2)
    found = np.concatenate([data.pretrain.images, data.test.images])[:, 0]
    assert sorted(map(bytes, found)) == sorted(map(bytes, codes.astype(np.int32)))


def test_bytes_are_viewed_where_they_lie(tmp_path):
    np.save(tmp_path / "train.npy", codes_of(8, 200).astype(np.uint8))
    np.save(tmp_path / "test.npy", codes_of(2, 200).astype(np.uint8))
    data = load_dataset("codes", tmp_path)
    assert data.pretrain.images.dtype == np.uint8
    # Nothing was copied: it is the file's own memory, which is read-only.
    assert not data.pretrain.images.flags.writeable


def test_labels_and_parts(tmp_path):
    codes = codes_of(6)
    np.savez(
        tmp_path / "codes.npz",
        train_images=codes,
        train_labels=np.array([0, 1, 2] * 2),
        test_images=codes[:3],
        test_labels=np.array([2, 0, 1]),
        classes=np.array(["a", "b", "c"]),
    )
    data = load_dataset("codes", tmp_path / "codes.npz")
    assert data.classes == ("a", "b", "c")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.labels.tolist() == [2, 0, 1]
    assert np.array_equal(data.test.images[:, 0], codes[:3])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (codes_of(4) - 1 - codes_of(4).max(), "codes count from 0, found -"),
        (codes_of(4).astype(np.float32), "codes are integers, found float32"),
        (codes_of(4) + 2**31, "codes count from 0"),
        (codes_of(4)[:, 0], "expected an array of images"),
    ],
)
def test_what_is_no_codes_is_refused(tmp_path, array, words):
    np.save(tmp_path / "codes.npy", array)
    with pytest.raises(ValueError, match=words):
        load_dataset("codes", tmp_path / "codes.npy")


def test_codes_of_several_sizes_and_of_another_size_are_refused(tmp_path):
    np.save(tmp_path / "train.npy", codes_of(4))
    with pytest.raises(ValueError, match="codes are not resized"):
        load_dataset("codes", tmp_path, image_size=8)
    assert load_dataset("codes", tmp_path, image_size=6).image_shape == (1, 6, 6)
    np.save(tmp_path / "test.npy", codes_of(4, side=5))
    with pytest.raises(ValueError, match=r"codes of several sizes: .*train"):
        load_dataset("codes", tmp_path)


def test_a_prior_is_trained_and_draws_arrays(tmp_path, capsys):
    np.save(tmp_path / "codes.npy", codes_of(40))
    common = ["--dataset", "codes", "--data-dir", str(tmp_path / "codes.npy"), "--steps", "2", "--device", "cpu"]
    small = ["--layers", "1", "--hidden-channels", "4", "--out-dir", str(tmp_path / "run")]
    assert training.main(["--model", "gated-pixelcnn", *common, *small, "--levels", "700", "--code-channels", "5"]) == 0
    assert sample.main([str(tmp_path / "run"), "--n", "3", "--device", "cpu"]) == 0
    drawn = np.load(tmp_path / "run" / "sampled.npy")
    assert drawn.shape == (3, 1, 6, 6)
    assert drawn.dtype == np.int64
    assert 256 < drawn.max() < 700
    known = tmp_path / "known.npy"
    np.save(known, drawn[0])
    complete = [str(tmp_path / "run"), "--n", "2", "--rows", "4", "--device", "cpu"]
    assert sample.main([*complete, "--complete", str(known), "--out", str(tmp_path / "both.npy")]) == 0
    completed = np.load(tmp_path / "both.npy")
    assert np.array_equal(completed[0], drawn[0])
    assert np.array_equal(completed[1:, :, :4], np.broadcast_to(drawn[0, :, :4], (2, 1, 4, 6)))
    capsys.readouterr()
    for array, words in (
        (drawn[0, :, :3], "integers [1, 6, 6] are wanted"),
        (drawn[0] + 700, "values 0 to 699"),
        (drawn[0] / 2, "integers"),
    ):
        np.save(known, array)
        assert sample.main([*complete, "--complete", str(known)]) == 1
        assert words in capsys.readouterr().err
    known.write_bytes(known.read_bytes()[:40])
    assert sample.main([*complete, "--complete", str(known)]) == 1
    assert "is not an array that can be read" in capsys.readouterr().err
    assert sample.main([*complete, "--complete", str(tmp_path / "photo.png")]) == 1
    assert "the run is of codes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gated-pixelcnn"], "holds codes, on which --model pixelcnn and gated-pixelcnn train"),
        (["--model", "gated-pixelcnn", "--levels", "300"], "--levels 300: codes holds values up to"),
        (["--model", "pixelcnn++"], "holds codes"),
        (["--model", "cpc-v1", "--crop", "32", "--grid-size", "3", "--pred-steps", "1"], "holds codes"),
        (["--model", "simclr", "--view-size", "32"], "holds codes"),
    ],
)
def test_models_that_know_no_codes_refuse_them(tmp_path, capsys, arguments, words):
    np.save(tmp_path / "codes.npy", codes_of(40, side=32))
    common = ["--dataset", "codes", "--data-dir", str(tmp_path / "codes.npy"), "--steps", "2", "--device", "cpu"]
    assert training.main([*arguments, *common, "--out-dir", str(tmp_path / "run")]) == 1
    assert words in capsys.readouterr().err
