"""Arrays in HDF5 files, as h5py writes them."""

import sys

import h5py
import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.images import array_sets
from tests.data.images.conftest import encoded, pictures

pytestmark = pytest.mark.usefixtures("cache")
X, Y = pictures(40, 20, 20, 3), np.arange(40) % 4


def write(path, compressed=(), **parts):
    with h5py.File(path, "w") as file:
        for name, array in parts.items():
            options = {"compression": "gzip", "chunks": (4, *array.shape[1:])} if name in compressed else {}
            file.create_dataset(name.replace("__", "/"), data=array, **options)
    return path


def check(data):
    np.testing.assert_array_equal(data.train.images, X[:30].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, X[30:].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.train.labels, Y[:30])
    np.testing.assert_array_equal(data.test.labels, Y[30:])
    assert data.name == "hdf5"


PARTS = {"train__images": X[:30], "train__labels": Y[:30], "test__images": X[30:], "test__labels": Y[30:]}


def test_groups_are_splits_and_what_lies_in_one_piece_is_mapped(tmp_path, cache):
    data = load_dataset("hdf5", write(tmp_path / "all.h5", **PARTS))
    check(data)
    assert isinstance(data.train.images, np.memmap)
    assert data.train.images.filename == tmp_path / "all.h5"
    assert not cache.exists()


def test_compressed_arrays_are_read_once(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(array_sets, "_BLOCK", 7)
    path = write(tmp_path / "all.h5", ["train__images", "test__images"], **PARTS)
    data = load_dataset("hdf5", path)
    check(data)
    assert data.train.paths == [f"train/images[{row}]" for row in range(30)]
    (cache_file,) = cache.rglob("images.bin")
    before = cache_file.stat().st_mtime_ns
    check(load_dataset("hdf5", tmp_path))
    assert cache_file.stat().st_mtime_ns == before


def test_a_file_for_each_part(tmp_path):
    for part, rows in (("train", slice(30)), ("test", slice(30, None))):
        write(tmp_path / f"camelyonpatch_level_2_split_{part}_x.h5", x=X[rows])
        write(tmp_path / f"camelyonpatch_level_2_split_{part}_y.h5", y=Y[rows, None, None, None])
    check(load_dataset("hdf5", tmp_path))


def test_the_contents_of_image_files(tmp_path):
    files = [np.frombuffer(encoded(pixels), np.uint8) for pixels in X]
    with h5py.File(tmp_path / "all.h5", "w") as file:
        kept = file.create_dataset("images", 40, h5py.vlen_dtype(np.uint8))
        for number, content in enumerate(files):
            kept[number] = content
        file["labels"] = [f"class{label}" for label in Y]
    with pytest.warns(UserWarning, match="5 of 40, about a tenth of each class"):
        data = load_dataset("hdf5", tmp_path)
    rows = [int(path.removeprefix("images[").removesuffix("]")) for path in data.train.paths]
    np.testing.assert_array_equal(data.train.images, X[rows].transpose(0, 3, 1, 2))
    assert data.classes == ("class0", "class1", "class2", "class3")
    np.testing.assert_array_equal(data.train.labels, Y[rows])


def test_arrays_of_one_image_each_are_refused(tmp_path):
    path = write(tmp_path / "all.h5", cat__0=X[0], cat__1=X[1], dog__0=X[2])
    with pytest.raises(ValueError, match=r"cat/0: .*shape \[20, 20, 3\], which is that of one image"):
        load_dataset("hdf5", path)


@pytest.mark.parametrize("kind", ["virtual", "external"])
def test_changes_of_other_files_that_arrays_are_in_are_seen(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    raw = tmp_path / "raw.bin"

    def fill(value):
        if kind == "virtual":
            write(tmp_path / "source.h5", x=np.full((30, 20, 20, 3), value, np.uint8))
        else:
            np.full((30, 20, 20, 3), value, np.uint8).tofile(raw)

    fill(3)
    with h5py.File(
        write(folder / "all.h5", train__labels=Y[:30], test__images=X[30:], test__labels=Y[30:]), "a"
    ) as file:
        if kind == "virtual":
            layout = h5py.VirtualLayout((30, 20, 20, 3), np.uint8)
            layout[...] = h5py.VirtualSource("../source.h5", "x", (30, 20, 20, 3))
            file.create_virtual_dataset("train/images", layout)
        else:
            file.create_dataset("train/images", (30, 20, 20, 3), np.uint8, external=[(str(raw), 0, raw.stat().st_size)])
    assert (load_dataset("hdf5", folder).train.images == 3).all()
    fill(200)
    assert (load_dataset("hdf5", folder).train.images == 200).all()


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path / "all.h5", ["train__images"], **PARTS)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no HDF5 at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"all\.h5: damaged, or no HDF5 file"):
            load_dataset("hdf5", path)
    with h5py.File(write(path, ["train__images"], **PARTS)) as file:
        offset = file["train/images"].id.get_chunk_info(3).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train/images cannot be read from row 0 on"):
        load_dataset("hdf5", path)


def test_files_without_images(tmp_path):
    write(tmp_path / "all.h5", y=Y)
    with pytest.raises(ValueError, match="expected an array of images"):
        load_dataset("hdf5", tmp_path)
    (tmp_path / "all.h5").unlink()
    with pytest.raises(ValueError, match=r"found no HDF5 file \(\.h5"):
        load_dataset("hdf5", write(tmp_path / "all.txt", y=Y).parent)


def test_without_h5py_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"HDF5 files are read by h5py \(.*\): pip install 'cpc_ext\[hdf5\]'"):
        load_dataset("hdf5", tmp_path)
