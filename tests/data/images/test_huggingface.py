"""What Hugging Face's datasets keeps on disk: files that version 5.2 of it wrote, and such as pyarrow makes."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from tests.data.images.conftest import encoded, pictures

# pyarrow 26 needs NumPy 2, beside which cpc_ext takes older ones.
pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("cache")
GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface"
X, Y = pictures(24, 14, 14, 3), np.arange(24) % 3
NAMES = ["ant", "bee", "cow"]


def drawn(counts):
    """The images of the golden files."""
    rng = np.random.default_rng(0)
    return [np.stack([rng.integers(0, 256, (12, 12, 3), np.uint8) for _ in range(count)]) for count in counts]


def quiet(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset("huggingface", path, **options)


def test_what_save_to_disk_has_written():
    data = quiet(GOLDEN / "saved")
    train, test = drawn((6, 4))
    np.testing.assert_array_equal(data.train.images, train.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, test.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.train.labels, np.arange(6) % 2)
    np.testing.assert_array_equal(data.test.labels, np.arange(4) % 2)
    assert (data.name, data.classes) == ("huggingface", ("cat", "dog"))
    assert data.train.paths[5] == "train/data-00000-of-00001.arrow[5]"


def test_parquet_as_the_hub_has_it():
    with pytest.warns(UserWarning, match="2 of 6, a tenth of each class"):
        data = load_dataset("huggingface", GOLDEN / "parquet")
    rows = [int(path.rpartition("[")[2].removesuffix("]")) for path in data.train.paths]
    np.testing.assert_array_equal(data.train.images, drawn((6,))[0][rows].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.train.labels, np.array(rows) % 2)
    assert data.classes == ("cat", "dog")


def table(rows, image="image", label="label", features=True, **columns):
    content = {
        image: [{"bytes": encoded(X[row]), "path": None} for row in rows],
        label: [int(Y[row]) for row in rows],
        **columns,
    }
    made = pyarrow.table(content)
    about = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": NAMES}}
    metadata = {"huggingface": json.dumps({"info": {"features": about}})} if features else {}
    return made.replace_schema_metadata(metadata)


def write(path, made, stream=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(made, path)
        return path
    writer = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with writer(str(path), made.schema) as out:
        out.write_table(made, max_chunksize=5)
    return path


def check(data, labels=Y, classes=tuple(NAMES)):
    np.testing.assert_array_equal(data.train.images, X[:18].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.images, X[18:].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.train.labels, labels[:18])
    np.testing.assert_array_equal(data.test.labels, labels[18:])
    assert data.classes == classes


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_shards_are_of_splits_by_their_names(tmp_path, ending):
    for name, rows in (("train-00000", range(9)), ("train-00001", range(9, 18)), ("validation-0", range(18, 24))):
        write(tmp_path / f"{name}.{ending}", table(rows))
    check(quiet(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"stream": False},
        {"image": "picture", "label": "kind"},
        {"image": "img", "label": "fine_label", "features": False},
    ],
)
def test_columns_and_kinds_of_files(tmp_path, options):
    stream = options.pop("stream", True)
    write(tmp_path / "train.arrow", table(range(18), **options), stream)
    write(tmp_path / "test.arrow", table(range(18, 24), **options), stream)
    check(quiet(tmp_path), classes=("0", "1", "2") if "features" in options else tuple(NAMES))


def test_other_columns_are_of_no_interest(tmp_path):
    for split, rows in (("train", range(18)), ("test", range(18, 24))):
        more = {"caption": ["a"] * len(rows), "boxes": [[1.0, 2.0]] * len(rows)}
        write(tmp_path / f"{split}.parquet", table(rows, **more))
    check(quiet(tmp_path))


def test_labels_that_are_none(tmp_path):
    for split, rows in (("train", range(18)), ("test", range(18, 24))):
        made = table(rows).drop_columns("label")
        write(tmp_path / f"{split}.parquet", made.append_column("label", [[-1] * len(rows)]))
    assert quiet(tmp_path).train is None


def test_files_that_a_state_does_not_name_are_of_no_interest(tmp_path):
    shutil.copytree(GOLDEN / "saved", tmp_path / "saved")
    folder = tmp_path / "saved" / "train"
    for name in ("data-00000-of-00002.arrow", "cache-0123456789abcdef.arrow"):
        write(folder / name, table(range(3)))
    assert len(quiet(tmp_path / "saved").train) == 6
    (folder / "state.json").unlink()
    write(folder / "data-00000-of-00002.arrow", table(range(2), features=False))
    assert len(quiet(tmp_path / "saved").train) == 8
    for path in (tmp_path / "saved").glob("*/data-*"):
        path.unlink()
    (tmp_path / "saved" / "test" / "state.json").unlink()
    with pytest.raises(ValueError, match="holds no file of a data set, only results of computations"):
        load_dataset("huggingface", tmp_path / "saved")


def test_a_shard_that_is_missing_is_named(tmp_path):
    write(tmp_path / "data-00000-of-00002.arrow", table(range(9)))
    state = {"_data_files": [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(FileNotFoundError, match=r"data-00001-of-00002\.arrow is missing, which state\.json"):
        load_dataset("huggingface", tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json: damaged"):
        load_dataset("huggingface", tmp_path)


def test_images_in_files_beside(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(X[0]))
    made = table(range(2)).drop_columns("image")
    beside = [{"bytes": None, "path": f"{row}.png"} for row in range(2)]
    write(tmp_path / "train.arrow", made.append_column("image", [beside]))
    write(tmp_path / "test.arrow", table(range(18, 24)))
    with pytest.warns(UserWarning, match=r"left out 1 samples:\n +1: holds no image \(train\.arrow\[1\]\)"):
        data = load_dataset("huggingface", tmp_path)
    np.testing.assert_array_equal(data.pretrain.images, X[:1].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("ending", "stream"), [("arrow", True), ("arrow", False), ("parquet", True)])
def test_files_that_are_cut_off_anywhere_are_named(tmp_path, ending, stream):
    path = write(tmp_path / f"train.{ending}", table(range(18)), stream)
    whole = path.read_bytes()
    # Some of these are where one batch of rows ends, which a reader of streams takes for the end of all.
    for end in (0, 5, 300, len(whole) // 2 // 8 * 8, *range(len(whole) - 80, len(whole), 8)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=rf"train\.{ending}: damaged"):
            load_dataset("huggingface", path)


def test_damaged_images_are_left_out(tmp_path):
    path = write(tmp_path / "train.arrow", table(range(18)))
    content = bytearray(path.read_bytes())
    start = content.index(encoded(X[7]))
    content[start + 50 : start + 90] = b"\xff" * 40
    path.write_bytes(content)
    write(tmp_path / "test.arrow", table(range(18, 24)))
    with pytest.warns(UserWarning, match=r"left out 1 samples:\n +1: .*\(train\.arrow\[7\]\)"):
        assert len(load_dataset("huggingface", tmp_path).train) == 17


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (pyarrow.table({"text": ["a"]}), r"train\.parquet: expected a column of images, found .*text"),
        (pyarrow.table({"image": [[1, 2]]}), r"content of files in column image, found list<"),
        (pyarrow.table({"image": pyarrow.array([None], pyarrow.binary())}), "1: holds no image"),
    ],
)
def test_files_without_images(tmp_path, made, message):
    write(tmp_path / "train.parquet", made)
    with pytest.raises(ValueError, match=message):
        load_dataset("huggingface", tmp_path)


def test_without_pyarrow_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"are read by pyarrow \(.*\): pip install 'cpc_ext\[huggingface\]'"):
        load_dataset("huggingface", GOLDEN)
