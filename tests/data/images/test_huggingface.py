"""Files of Hugging Face's datasets: some written by its version 5.2, others made with pyarrow."""

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
    with pytest.warns(UserWarning, match="2 of 6, about a tenth of each class"):
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


def test_of_several_columns_of_a_type_the_usual_one_counts(tmp_path):
    """As CIFAR-100's, wherever the coarse labels stand; which was taken is told."""
    kinds = {"mask": "Image", "image": "Image", "coarse_label": "ClassLabel", "fine_label": "ClassLabel"}
    names = {"coarse_label": ["x", "y"], "fine_label": NAMES}
    about = {name: {"_type": kind} | ({"names": names[name]} if name in names else {}) for name, kind in kinds.items()}
    for split, rows in (("train", range(18)), ("test", range(18, 24))):
        made = {
            "mask": [{"bytes": encoded(X[0]), "path": None} for _ in rows],
            "image": [{"bytes": encoded(X[row]), "path": None} for row in rows],
            "coarse_label": [int(Y[row]) % 2 for row in rows],
            "fine_label": [int(Y[row]) for row in rows],
        }
        metadata = {"huggingface": json.dumps({"info": {"features": about}})}
        write(tmp_path / f"{split}.arrow", pyarrow.table(made).replace_schema_metadata(metadata))
    with pytest.warns(UserWarning, match="labels are taken from column fine_label, and not from coarse_label") as told:
        data = load_dataset("huggingface", tmp_path)
    assert "images are taken from column image, and not from mask" in str(told[0].message)
    check(data)


def test_other_columns_are_of_no_interest(tmp_path):
    for split, rows in (("train", range(18)), ("test", range(18, 24))):
        more = {"caption": ["a"] * len(rows), "boxes": [[1.0, 2.0]] * len(rows)}
        write(tmp_path / f"{split}.parquet", table(rows, **more))
    check(quiet(tmp_path))


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        (pyarrow.float64(), float),
        (pyarrow.float32(), float),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), lambda label: NAMES[label]),
        (pyarrow.dictionary(pyarrow.int32(), pyarrow.int64()), int),
    ],
)
@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_labels_as_pandas_has_them(tmp_path, kind, of, ending):
    for split, rows in (("train", range(18)), ("test", range(18, 24))):
        values = pyarrow.array([of(Y[row]) for row in rows], None if pyarrow.types.is_dictionary(kind) else kind)
        if pyarrow.types.is_dictionary(kind):
            values = values.cast(kind.value_type).dictionary_encode().cast(kind)
        made = table(rows, features=False).drop_columns("label").append_column("label", values)
        write(tmp_path / f"{split}.{ending}", made)
    names = of(0) in NAMES
    check(quiet(tmp_path), classes=tuple(NAMES) if names else ("0", "1", "2"))


def test_gaps_among_labels_are_none(tmp_path):
    for split, rows in (("train", range(18)), ("test", range(18, 24))):
        labels = [float(Y[row]) if row != 5 else gap for row, gap in zip(rows, [float("nan")] * 18, strict=False)]
        write(tmp_path / f"{split}.parquet", table(rows).drop_columns("label").append_column("label", [labels]))
    with pytest.warns(UserWarning, match="1 of 24 images have no label, so none has"):
        assert load_dataset("huggingface", tmp_path).train is None


def test_what_is_no_label_is_told(tmp_path):
    made = table(range(18), features=False).drop_columns("label")
    write(tmp_path / "train.arrow", made.append_column("label", [[[1, 2]] * 18]))
    write(tmp_path / "test.arrow", table(range(18, 24)))
    with pytest.warns(
        UserWarning, match="column label holds list<.*>, of which there are no classes, so the images have"
    ):
        assert load_dataset("huggingface", tmp_path).train is None
    write(tmp_path / "train.arrow", made.append_column("label", [[0.5] * 18]))
    with pytest.warns(
        UserWarning, match=r"neither an integer nor a name in place of a label in 18 samples: train\.arrow\[0\]"
    ):
        assert load_dataset("huggingface", tmp_path).train is None


def test_a_labelled_validation_part_is_tested_on_where_the_test_part_has_no_labels(tmp_path):
    """As ImageNet-1k is on the hub."""
    hidden = table(range(9)).drop_columns("label")
    write(tmp_path / "train-0.parquet", table(range(18)))
    write(tmp_path / "test-0.parquet", hidden.append_column("label", [[-1] * 9]))
    with pytest.warns(UserWarning, match="9 of 9 test images have no label, so none of them has"):
        data = load_dataset("huggingface", tmp_path)
    np.testing.assert_array_equal(data.train.labels, Y[:18])
    assert (len(data.test), data.test.labels, data.classes) == (9, None, tuple(NAMES))
    write(tmp_path / "validation-0.parquet", table(range(18, 24)))
    with pytest.warns(UserWarning, match=r"as only what is for validation has labels: test-0\.parquet"):
        check(load_dataset("huggingface", tmp_path))
    write(tmp_path / "test-0.parquet", table(range(9)))
    with pytest.warns(UserWarning, match=r"left out for validation, as there is something to test on: validation-0"):
        assert len(load_dataset("huggingface", tmp_path).test) == 9


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


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_changes_of_images_in_files_beside_are_seen(tmp_path, cache, ending, stream):
    (tmp_path / "0.png").write_bytes(encoded(X[0]))
    beside = [{"bytes": None, "path": f"{row}.png"} for row in range(2)] + [{"bytes": encoded(X[2]), "path": "x.png"}]
    write(tmp_path / f"train.{ending}", table(range(3)).drop_columns("image").append_column("image", [beside]), stream)
    write(tmp_path / f"test.{ending}", table(range(18, 24)), stream)

    def shown(rows):
        data = load_dataset("huggingface", tmp_path)
        (file,) = cache.rglob("images.bin")
        np.testing.assert_array_equal(data.pretrain.images, X[rows].transpose(0, 3, 1, 2))
        return file.stat().st_ino

    with pytest.warns(UserWarning, match=r"1: holds no image \(train\.[a-z]+\[1\]\)"):
        shown([0, 2])
    (tmp_path / "1.png").write_bytes(encoded(X[1]))
    before = shown([0, 1, 2])
    assert shown([0, 1, 2]) == before
    (tmp_path / "0.png").write_bytes(encoded(X[7]))
    shown([7, 1, 2])


def test_names_beside_images_that_are_there_are_not_looked_for(tmp_path, cache):
    """Whoever has the bytes of every image has names as well, of files that are elsewhere."""
    inside = [{"bytes": encoded(X[row]), "path": f"{row}.png"} for row in range(18)]
    for ending in ("parquet", "arrow"):
        folder = tmp_path / ending
        made = table(range(18)).drop_columns("image").append_column("image", [inside])
        write(folder / f"train.{ending}", made)
        write(folder / f"test.{ending}", table(range(18, 24)))
        check(quiet(folder))
        (built,) = (cache / "folders").glob(f"{ending}-*/*/images.bin")
        before = built.stat().st_ino
        (folder / "0.png").touch()
        check(quiet(folder))
        assert built.stat().st_ino == before


@pytest.mark.parametrize(("ending", "stream"), [("arrow", True), ("arrow", False), ("parquet", True)])
def test_files_that_are_cut_off_anywhere_are_named(tmp_path, ending, stream):
    path = write(tmp_path / f"train.{ending}", table(range(18)), stream)
    whole = path.read_bytes()
    # Some of these lengths are ends of a batch of rows, which a stream reader takes for the end of the stream.
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
