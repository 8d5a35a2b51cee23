"""CIFAR's binary formats, on files of the published sizes."""

import os
import pickle

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.images.published import cifar10 as files10
from cpc_ext.data.images.published import cifar100 as files100


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


# ---- The version for Python, as torchvision keeps it ----


def pickled(path, content, **options):
    path.write_bytes(pickle.dumps(content, **options))


FEW = 20


@pytest.fixture
def python10(tmp_path, monkeypatch):
    """CIFAR-10's pickles with fewer images than published, as pickles cannot be sparse."""
    monkeypatch.setattr(files10, "BATCH", FEW)
    monkeypatch.setattr(files10, "TEST", FEW)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = {}
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        images[name] = rng.integers(0, 256, (FEW, 3072), np.uint8)
        labels = ((np.arange(FEW) + i) % 10).tolist()
        pickled(folder / name, {"data": images[name], "labels": labels, "batch_label": "", "filenames": []}, protocol=2)
    pickled(folder / "batches.meta", {"label_names": [f"class{i}" for i in range(10)], "num_vis": 3072})
    return folder, images


def test_cifar10_for_python(python10):
    folder, images = python10
    assert len(load_dataset("cifar10", folder.parent).train) == 5 * FEW
    dataset = load_dataset("cifar10", folder)
    for i in range(5):
        batch = slice(FEW * i, FEW * (i + 1))
        np.testing.assert_array_equal(dataset.train.images[batch], images[f"data_batch_{i + 1}"].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(dataset.train.labels[batch], (np.arange(FEW) + i) % 10)
    np.testing.assert_array_equal(dataset.test.images, images["test_batch"].reshape(-1, 3, 32, 32))
    assert dataset.pretrain is dataset.train
    assert dataset.classes[3] == "class3"


def test_binary_files_come_first(python10, tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin is missing"):
        load_dataset("cifar10", tmp_path)


def test_cifar100_for_python_has_its_fine_labels(tmp_path, monkeypatch):
    for name, count in (("TRAIN", 200), ("TEST", 100)):
        monkeypatch.setattr(files100, name, count)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        fine = np.arange(count) % 100
        content = {
            "data": np.full((count, 3072), 7, np.uint8),
            "fine_labels": fine.tolist(),
            "coarse_labels": [0] * count,
        }
        pickled(folder / name, content)
    pickled(folder / "meta", {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": []})
    dataset = load_dataset("cifar100", tmp_path)
    np.testing.assert_array_equal(dataset.train.labels, np.arange(200) % 100)
    assert (len(dataset.test), dataset.classes[42]) == (100, "fine42")


def test_pickles_of_python_2_are_read(python10):
    """Protocol 2 with byte strings, as the published files have them."""
    folder, _ = python10
    stream = b"\x80\x02}U\x0blabel_names](" + b"".join(b"U\x02c%d" % i for i in range(10)) + b"es."
    (folder / "batches.meta").write_bytes(stream)
    assert load_dataset("cifar10", folder).classes == tuple(f"c{i}" for i in range(10))


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", {"labels": [0] * FEW}, r"expected data as uint8 \[20, 3072\], found NoneType"),
        ("data_batch_2", {"data": np.zeros((9, 3072), np.uint8)}, r"found uint8 \[9, 3072\]"),
        ("test_batch", {"data": np.zeros((FEW, 3072), np.uint8), "labels": [1]}, "20 integers, found 1 values"),
        (
            "test_batch",
            {"data": np.zeros((FEW, 3072), np.uint8), "labels": [10] * FEW},
            r"expected labels 0\.\.9",
        ),
        ("batches.meta", {"label_names": ["cat"]}, "expected label_names as 10 names, found 1 values"),
        ("batches.meta", [1], "expected a mapping, found list"),
    ],
)
def test_other_pickles_are_named(python10, name, content, message):
    folder, _ = python10
    pickled(folder / name, content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        load_dataset("cifar10", folder)


def test_damaged_and_missing_pickles_are_named(python10):
    folder, _ = python10
    whole = (folder / "data_batch_3").read_bytes()
    for damaged in (whole[:5000], b"", b"GIF89a"):
        (folder / "data_batch_3").write_bytes(damaged)
        with pytest.raises(ValueError, match="data_batch_3: damaged, or no file of CIFAR's"):
            load_dataset("cifar10", folder)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3 is missing"):
        load_dataset("cifar10", folder)


def test_a_pickle_runs_nothing(python10, tmp_path):
    folder, _ = python10
    pickled(folder / "batches.meta", {"label_names": Command(tmp_path / "made")})
    with pytest.raises(ValueError, match=r"batches\.meta: .*it asks for \w+\.mkdir, which no images are made of"):
        load_dataset("cifar10", folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("cifar10", "'cifar-10-batches-bin' or 'cifar-10-batches-py'"),
        ("cifar100", "'cifar-100-binary' or 'cifar-100-python'"),
    ],
)
def test_where_nothing_is_both_folders_are_named(tmp_path, name, folders):
    with pytest.raises(FileNotFoundError, match=f"no folder {folders} in "):
        load_dataset(name, tmp_path)
