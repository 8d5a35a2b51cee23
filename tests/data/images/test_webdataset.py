"""WebDataset's shards: samples, splits, left-out files, damaged archives."""

import io
import json
import tarfile
import warnings

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.images.typical_side import typical_side
from tests.data.images.conftest import encoded, pictures

pytestmark = pytest.mark.usefixtures("cache")
X, Y = pictures(24, 14, 14, 3), np.arange(24) % 3


def shard(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def files(rows, label=lambda row: {"cls": b"%d" % Y[row]}, **more):
    found = {}
    for row in rows:
        fields = {"png": encoded(X[row]), **label(row), **more}
        found |= {f"sample{row:04d}.{ending}": content for ending, content in fields.items()}
    return found


def rows_of(images):
    return [int(path.rpartition("sample")[2]) for path in images.paths]


def check(data, labels=Y):
    for part in (data.train, data.test):
        np.testing.assert_array_equal(part.images, X[rows_of(part)].transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(part.labels, labels[rows_of(part)])


def quiet(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset("webdataset", path, **options)


@pytest.mark.parametrize(
    "names",
    [
        ("data-train-0000.tar", "data-train-0001.tar", "data-val-0000.tar"),
        ("train/0000.tar", "train/0001.tar", "test/0000.tar"),
    ],
)
def test_shards_are_of_splits_by_their_names(tmp_path, names):
    for name, rows in zip(names, (range(10), range(10, 18), range(18, 24)), strict=True):
        shard(tmp_path / name, files(rows))
    data = quiet(tmp_path)
    check(data)
    assert (rows_of(data.train), rows_of(data.test)) == (list(range(18)), list(range(18, 24)))
    assert (data.name, data.classes) == ("webdataset", ("0", "1", "2"))
    assert quiet(tmp_path, image_size=8).image_shape == (3, 8, 8)


def test_a_single_shard_has_a_part_held_out(tmp_path):
    path = shard(tmp_path / "all.tar", files(range(24)))
    with pytest.warns(UserWarning, match="3 of 24, about a tenth of each class"):
        data = load_dataset("webdataset", path)
    check(data)
    assert sorted(data.test.labels) == [0, 1, 2]


@pytest.mark.parametrize(
    "label",
    [
        lambda row: {"cls": b" %d\n" % Y[row]},
        lambda row: {"json": json.dumps({"label": int(Y[row]), "other": 1}).encode()},
        lambda row: {"json": json.dumps({"label": float(Y[row])}).encode()},
        lambda row: {"cls": b"%d" % Y[row], "json": b'{"label": 99}', "txt": b"a caption"},
        lambda row: {"cls": [b"ant", b"bee", b"cow"][Y[row]]},
        lambda row: {"output.cls": b"%d" % Y[row]},
        lambda row: {"about.json": json.dumps({"label": int(Y[row])}).encode()},
    ],
)
def test_labels_in_every_place(tmp_path, label):
    shard(tmp_path / "train.tar", files(range(18), label))
    shard(tmp_path / "test.tar", files(range(18, 24), label))
    check(quiet(tmp_path))


def test_compressed_shards_are_called_as_webdataset_calls_them(tmp_path):
    shard(tmp_path / "train-0000.tar.gz", files(range(18)), "w:gz")
    shard(tmp_path / "test-0000.tar.gz", files(range(18, 24)), "w:gz")
    (tmp_path / "index.gz").write_bytes(b"no shard")
    check(quiet(tmp_path))
    assert typical_side(tmp_path) == 14
    with pytest.warns(UserWarning, match="a tenth of each class"):
        assert len(load_dataset("webdataset", tmp_path / "train-0000.tar.gz").train) == 15


def test_what_else_is_in_shards(tmp_path):
    about = {"__key__": b"", "./x/": None, **{f"./{name}": content for name, content in files(range(18)).items()}}
    shard(tmp_path / "train.tgz", about, "w:gz")
    shard(tmp_path / "test.tar", files(range(18, 24), **{"seg.png": encoded(X[0])}))
    (tmp_path / "index.json").write_text("{}")
    data = quiet(tmp_path)
    assert data.train.paths[0] == "train.tgz/sample0000"
    np.testing.assert_array_equal(data.test.images, X[18:].transpose(0, 3, 1, 2))  # The first image of each sample.
    assert len(data.test) == 6


@pytest.mark.parametrize("order", [("png", "depth.png"), ("depth.png", "png"), ("a/depth.png", "a/png")])
def test_the_image_without_a_further_dot_is_taken(tmp_path, order):
    folder, members = "/".join(order[0].split("/")[:-1]), {}
    for row in range(18):
        for ending in order:
            kind = ending.rpartition("/")[2]
            content = encoded(X[row] if kind == "png" else 255 - X[row])
            members[f"{folder}/sample{row:04d}.{kind}".lstrip("/")] = content
        members[f"{folder}/sample{row:04d}.a.cls".lstrip("/")] = b"7"
        members[f"{folder}/sample{row:04d}.cls".lstrip("/")] = b"%d" % Y[row]
    shard(tmp_path / "train.tar", members)
    shard(tmp_path / "test.tar", files(range(18, 24)))
    check(quiet(tmp_path))


def test_the_first_of_several_images_is_told(tmp_path):
    """As where numbers follow a dot, which makes the files of a folder one sample."""
    numbered = {f"img.{row:03d}.png": encoded(X[row]) for row in range(18)}
    shard(tmp_path / "train.tar", numbered | {"one.png": encoded(X[18])})
    shard(tmp_path / "test.tar", files(range(18, 24), lambda row: {}))
    for _ in range(2):  # The second time from the cache.
        with pytest.warns(UserWarning, match=r"took the first of several images in 1 samples: train\.tar/img"):
            data = load_dataset("webdataset", tmp_path)
        np.testing.assert_array_equal(data.pretrain.images, X[[0, 18]].transpose(0, 3, 1, 2))


def test_a_name_that_is_met_twice_in_a_sample_is_an_error(tmp_path):
    path = shard(tmp_path / "train.tar", files(range(3)))
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("sample0002.png"))
    with pytest.raises(ValueError, match=r"train\.tar: holds sample0002\.png twice in one sample"):
        load_dataset("webdataset", tmp_path)


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_archives_behind_each_other_are_an_error(tmp_path, kind):
    """As cat makes them, of which readers see the first."""
    mode = "w:gz" if kind == "tgz" else "w"
    parts = [shard(tmp_path / f"{n}.{kind}", files(range(n, n + 3)), mode).read_bytes() for n in (0, 3)]
    path = tmp_path / f"train.{kind}"
    path.write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match=rf"train\.{kind}: damaged or cut off: more follows the archive's end"):
        load_dataset("webdataset", path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("type", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_what_they_lead_to(tmp_path, mode, type):
    path = tmp_path / ("train.tar" if mode == "w" else "train.tgz")

    def write(links):
        with tarfile.open(path, mode) as archive:
            for name, content in files(range(18)).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if name in links:
                    member.type, member.linkname, member.size = type, links[name], 0
                archive.addfile(member, io.BytesIO(content))

    write({"sample0004.cls": "sample0001.cls", "sample0017.cls": "sample0002.cls"})
    shard(tmp_path / "test.tar", files(range(18, 24)))
    check(quiet(tmp_path))
    write({"sample0004.png": "none.png"})
    with pytest.raises(ValueError, match=r"damaged or cut off: .*none\.png"):
        load_dataset("webdataset", path)


def test_samples_of_one_name_in_two_folders(tmp_path):
    shard(tmp_path / "train.tar", {f"{folder}/0.png": encoded(X[row]) for row, folder in enumerate("abc")})
    shard(tmp_path / "test.tar", files(range(18, 24), lambda row: {}))
    data = quiet(tmp_path)
    np.testing.assert_array_equal(data.pretrain.images, X[:3].transpose(0, 3, 1, 2))
    assert data.pretrain.paths == ["train.tar/a/0", "train.tar/b/0", "train.tar/c/0"]


def test_samples_that_cannot_be_taken_are_left_out(tmp_path):
    content = files(range(18)) | {"sample0001.png": b"", "sample0002.png": encoded(X[2])[:90]}
    del content["sample0003.png"]
    shard(tmp_path / "train.tar", content)
    shard(tmp_path / "test.tar", files(range(18, 24)))
    with pytest.warns(UserWarning, match="left out 3 samples") as warned:
        data = load_dataset("webdataset", tmp_path)
    assert r"1: holds no image (train.tar/sample0003)" in str(warned[0].message)
    assert rows_of(data.train) == [0, *range(4, 18)]
    check(data)


def test_another_pillow_tries_samples_that_one_could_not_read(tmp_path, monkeypatch):
    shard(tmp_path / "train.tar", files(range(18)) | {"sample0002.png": encoded(X[2])[:90]})
    shard(tmp_path / "test.tar", files(range(18, 24)))
    monkeypatch.setattr("PIL.__version__", "99.0")
    with pytest.warns(UserWarning, match="left out 1 samples"):
        load_dataset("webdataset", tmp_path)
    monkeypatch.setattr("PIL.__version__", "99.1")
    with pytest.warns(UserWarning, match=r"Pillow 99\.0 could not read all of them, this is 99\.1"):
        load_dataset("webdataset", tmp_path)


@pytest.mark.parametrize("fields", [{"cls": b"-1"}, {"json": b'{"label": -1}'}])
def test_a_label_of_minus_one_is_none(tmp_path, fields):
    shard(tmp_path / "0.tar", files(range(23)) | files([23], lambda row: fields))
    with pytest.warns(UserWarning, match="1 of 24 images have no label, so none has"):
        assert load_dataset("webdataset", tmp_path).train is None


@pytest.mark.parametrize("label", [1.5, [1, 2], {"a": 1}])
def test_labels_of_other_types_are_told(tmp_path, label):
    shard(tmp_path / "0.tar", files(range(24), lambda row: {"json": json.dumps({"label": label}).encode()}))
    with pytest.warns(
        UserWarning, match=r"neither an integer nor a name in place of a label in 24 samples: 0\.tar/sampl"
    ):
        assert load_dataset("webdataset", tmp_path).train is None


@pytest.mark.parametrize("fields", [{}, {"cls": b"-1"}])
def test_test_samples_without_labels_leave_the_training_samples_theirs(tmp_path, fields):
    shard(tmp_path / "train.tar", files(range(18)))
    shard(tmp_path / "test.tar", files(range(18, 24), lambda row: fields))
    with pytest.warns(UserWarning, match="6 of 6 test images have no label, so none of them has"):
        data = load_dataset("webdataset", tmp_path)
    np.testing.assert_array_equal(data.train.labels, Y[:18])
    assert (data.classes, data.test.labels) == (("0", "1", "2"), None)
    shard(tmp_path / "val.tar", files(range(18, 24)))
    with pytest.warns(UserWarning, match=r"as only what is for validation has labels: test\.tar"):
        check(load_dataset("webdataset", tmp_path))


def test_labels_that_some_samples_lack(tmp_path):
    shard(tmp_path / "train.tar", files(range(9)) | files(range(9, 18), lambda row: {}))
    shard(tmp_path / "test.tar", files(range(18, 24)))
    with pytest.warns(UserWarning, match="9 of 24 images have no label, so none has"):
        assert load_dataset("webdataset", tmp_path).train is None


def test_unlabelled_shards_are_trained_on(tmp_path):
    shard(tmp_path / "unlabeled.tar", files(range(9), lambda row: {}))
    shard(tmp_path / "train.tar", files(range(9, 18)))
    shard(tmp_path / "test.tar", files(range(18, 24)))
    data = quiet(tmp_path)
    check(data)
    assert rows_of(data.train) == list(range(9, 18))
    np.testing.assert_array_equal(data.pretrain.images, X[:9].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_archives_that_are_cut_off_anywhere_are_named(tmp_path, kind):
    path = shard(tmp_path / f"train.{kind}", files(range(6)), "w:gz" if kind == "tgz" else "w")
    whole = path.read_bytes()
    last = whole.rstrip(b"\0") if kind == "tar" else whole
    # In content, in a header, between two files, and before the end.
    for end in (0, 100, 700, 1024, 1536, len(whole) // 2 // 512 * 512, len(last) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=rf"train\.{kind}: damaged or cut off"):
            load_dataset("webdataset", path)


def test_archives_with_a_damaged_header_are_named(tmp_path):
    path = shard(tmp_path / "train.tar", files(range(6)))
    content = bytearray(path.read_bytes())
    start = content.index(b"sample0003.png")
    content[start : start + 512] = b"\x55" * 512
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"train\.tar: damaged or cut off: byte {start} is neither a file's header"):
        load_dataset("webdataset", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (files(range(3), lambda row: {"json": b"{"}), r"train\.tar: sample0000\.json: "),
        ({"a.txt": b"caption"}, r"no image to train on could be read\n  left out 1 samples:\n    1: holds no image"),
        ({}, "no image to train on could be read"),
        (files(range(3), lambda row: {"cls": b"1" if row else b"ant"}), "some labels are numbers, others names"),
    ],
)
def test_shards_of_something_else(tmp_path, content, message):
    shard(tmp_path / "train.tar", content)
    with pytest.raises(ValueError, match=message):
        load_dataset("webdataset", tmp_path)
