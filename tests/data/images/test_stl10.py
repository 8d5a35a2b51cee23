"""STL-10's binary format, on sparse files of the published sizes with a few images written into them."""

import numpy as np
import pytest

from cpc_ext.data import load_dataset

PIXELS = 3 * 96 * 96
COUNTS = {"unlabeled": 100_000, "train": 5_000, "test": 8_000}


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 96, 96), np.uint8)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for number, (split, count) in enumerate(COUNTS.items()):
        with (folder / f"{split}_X.bin").open("wb") as file:
            file.truncate(count * PIXELS)
            for index in (0, count - 1):
                file.seek(index * PIXELS)
                # Column by column: [channel][column][row].
                file.write(image(number + index).transpose(0, 2, 1).tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(count)))
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    folds = [" ".join(str((fold * 500 + i) % 5000) for i in range(1000)) for fold in range(10)]
    (folder / "fold_indices.txt").write_text("\n".join(folds) + "\n")
    return folder


def test_images_labels_and_folds(folder):
    dataset = load_dataset("stl10", folder.parent)
    for number, (split, count) in enumerate(COUNTS.items()):
        images = getattr(dataset, {"unlabeled": "pretrain"}.get(split, split)).images
        assert images.shape == (count, 3, 96, 96)
        np.testing.assert_array_equal(images[0], image(number))
        np.testing.assert_array_equal(images[-1], image(number + count - 1))
    assert dataset.pretrain.labels is None
    np.testing.assert_array_equal(dataset.train.labels, np.arange(5000) % 10)
    assert dataset.classes == tuple(f"class{i}" for i in range(10))
    assert [len(fold) for fold in dataset.folds] == [1000] * 10
    assert dataset.folds[1][0] == 500
    assert dataset.mean == (0.4313, 0.4156, 0.3663)
    assert (dataset.gray_mean, dataset.gray_std) == (0.4120, 0.2570)


def test_images_stay_on_disk(folder):
    images = load_dataset("stl10", folder.parent).pretrain.images
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable


def test_data_dir_may_be_the_folder_itself(folder):
    assert len(load_dataset("stl10", folder).train) == 5000


@pytest.mark.parametrize("name", ["unlabeled_X.bin", "train_X.bin", "test_y.bin"])
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_named(folder, name, change):
    with (folder / name).open("rb+") as file:
        size = file.seek(0, 2)
        file.truncate(size + change)
    with pytest.raises(ValueError, match=rf"{name}: expected .* {size} bytes in all, found {size + change} bytes"):
        load_dataset("stl10", folder.parent)


@pytest.mark.parametrize("name", ["unlabeled_X.bin", "train_y.bin", "class_names.txt", "fold_indices.txt"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*--download"):
        load_dataset("stl10", folder.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_y.bin", bytes(5000), r"expected labels 1\.\.10, found 0\.\.0"),
        ("class_names.txt", b"cat dog", "expected 10 class names, found 2"),
        ("fold_indices.txt", b"1 2 3\n", r"expected 10 lines of 1000 indices, found \[3\]"),
        ("train_y.bin", bytes([11]) * 5000, r"expected labels 1\.\.10, found 11\.\.11"),
        ("class_names.txt", b"\xff\xfe", "expected 10 class names, found no text"),
        ("fold_indices.txt", b"", r"expected 10 lines of 1000 indices, found \[\]"),
        ("fold_indices.txt", b"one two\n", "expected lines of indices"),
        ("fold_indices.txt", b"\xff\xfe\n", "expected lines of indices"),
        ("fold_indices.txt", b"99999999999999999999\n", "expected lines of indices"),
        ("fold_indices.txt", b"-1 " * 1000 + b"\n" + (b"0 " * 1000 + b"\n") * 9, r"expected indices 0\.\.4999"),
        ("fold_indices.txt", b"5000 " * 1000 + b"\n" + (b"0 " * 1000 + b"\n") * 9, r"expected indices 0\.\.4999"),
    ],
)
def test_damaged_contents_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        load_dataset("stl10", folder.parent)


def test_other_image_size_is_refused(folder):
    with pytest.raises(ValueError, match="96 pixels a side, got 64"):
        load_dataset("stl10", folder.parent, image_size=64)
