"""CIFAR's binary formats, on files of the published sizes."""

import numpy as np
import pytest

from cpc_ext.data import load_dataset


def write_records(path, seed: int, count: int, *label_columns: np.ndarray) -> np.ndarray:
    """Write label bytes and random images; return the first and last image."""
    records = np.zeros((count, len(label_columns) + 3072), np.uint8)
    for column, labels in enumerate(label_columns):
        records[:, column] = labels
    ends = np.random.default_rng(seed).integers(0, 256, (2, 3072), np.uint8)
    records[[0, -1], len(label_columns) :] = ends
    path.write_bytes(records.tobytes())
    return ends.reshape(2, 3, 32, 32)


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    ends = {}
    for i, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        ends[name] = write_records(folder / name, i, 10_000, (np.arange(10_000) + i) % 10)
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    return folder, ends


@pytest.fixture
def cifar100(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    ends = {}
    for i, (name, count) in enumerate({"train.bin": 50_000, "test.bin": 10_000}.items()):
        fine = np.arange(count) % 100
        ends[name] = write_records(folder / name, i, count, fine // 5, fine)
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)) + "\n")
    return folder, ends


def test_cifar10(cifar10):
    folder, ends = cifar10
    dataset = load_dataset("cifar10", folder.parent)
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    for i in range(5):
        batch = slice(10_000 * i, 10_000 * (i + 1))
        np.testing.assert_array_equal(dataset.train.images[batch][[0, -1]], ends[f"data_batch_{i + 1}.bin"])
        np.testing.assert_array_equal(dataset.train.labels[batch], (np.arange(10_000) + i) % 10)
    np.testing.assert_array_equal(dataset.test.images[[0, -1]], ends["test_batch.bin"])
    assert dataset.pretrain is dataset.train
    assert dataset.classes[3] == "class3"


def test_cifar100_has_its_fine_labels(cifar100):
    folder, ends = cifar100
    dataset = load_dataset("cifar100", folder)
    np.testing.assert_array_equal(dataset.train.images[[0, -1]], ends["train.bin"])
    np.testing.assert_array_equal(dataset.test.images[[0, -1]], ends["test.bin"])
    np.testing.assert_array_equal(dataset.train.labels, np.arange(50_000) % 100)
    assert len(dataset.classes) == 100
    assert not dataset.train.images.flags.owndata


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_truncated_batch_is_named(cifar10, name):
    folder, _ = cifar10
    with (folder / name).open("rb+") as file:
        file.truncate(1_000_000)
    with pytest.raises(ValueError, match=f"{name}: expected 10000 records of 3073 bytes.*found 1000000 bytes"):
        load_dataset("cifar10", folder.parent)


def test_missing_batch_is_named(cifar10):
    folder, _ = cifar10
    (folder / "data_batch_5.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_5\.bin is missing"):
        load_dataset("cifar10", folder.parent)


def test_label_outside_the_classes_is_named(cifar10):
    folder, _ = cifar10
    with (folder / "data_batch_2.bin").open("rb+") as file:
        file.write(bytes([10]))
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: expected labels 0\.\.9, found 0\.\.10"):
        load_dataset("cifar10", folder.parent)
