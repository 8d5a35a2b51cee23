"""Folders of images: splits and classes, decoding, and a cache that is rebuilt only when the tree changed."""

import json
import multiprocessing
import os
import resource
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpc_ext.data import load_dataset
from cpc_ext.data.images import decode_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    place = tmp_path / "cache"
    monkeypatch.setenv("CPC_EXT_CACHE", str(place))
    return place


# A tenth of hashes begins with bytes below this.
TENTH = (2**64 // 10).to_bytes(8, "big")

# Warnings about folders have tests of their own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


def write(path: Path, colour=(0, 0, 0), size=(8, 8), mode="RGB", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


def write_class(folder: Path, count: int, value: int = 0) -> None:
    for i in range(count):
        write(folder / f"{i:03}.png", (value, i, 0))


def load(root: Path, **options):
    return load_dataset("folder", root, **options)


def builds(monkeypatch) -> list[int]:
    """A list with one entry for each decoding of a whole tree."""
    decoded = []
    original = decode_cache.decode_all

    def counted(files, *rest):
        decoded.append(len(files))
        return original(files, *rest)

    monkeypatch.setattr(decode_cache, "decode_all", counted)
    return decoded


def test_train_and_test_folders(root):
    for split, count in (("train", 3), ("test", 2)):
        for value, name in enumerate(("cat", "dog")):
            write_class(root / split / name, count, value)
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.pretrain), len(dataset.train), len(dataset.test)) == (6, 6, 4)
    for part in (dataset.train, dataset.test):
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0])
        assert [Path(p).parts[1] for p in part.paths] == [dataset.classes[label] for label in part.labels]
    assert isinstance(dataset.train.images, np.memmap)
    assert dataset.image_shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_folder_is_the_test_split(root, name):
    for split in ("train", name):
        for value, label in enumerate("ab"):
            write_class(root / split / label, 2, value)
    assert all(path.startswith(name) for path in load(root).test.paths)


@pytest.mark.parametrize(("below", "held"), [("", [2, 4]), ("train", [2, 7])])
def test_a_tenth_of_each_class_is_held_out(root, below, held):
    write_class(root / below / "a", 20, 0)
    write_class(root / below / "b" / "nested", 30, 1)
    write_class(root / below / "single", 1, 2)
    dataset = load(root)
    assert np.bincount(dataset.train.labels).tolist() == [20 - held[0], 30 - held[1], 1]
    assert np.bincount(dataset.test.labels).tolist() == held
    assert not set(dataset.train.paths) & set(dataset.test.paths)
    for part in (dataset.train, dataset.test):
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0])
        assert [int(Path(p).stem) for p in part.paths] == part.images[:, 1, 0, 0].tolist()
    assert load(root, seed=7).test.paths == dataset.test.paths


def test_what_is_held_out_is_so_when_others_have_come(root):
    """An image that was trained on is never tested on."""
    trained = set()
    for count in (2, 5, 20, 60):
        write_class(root / "a", count)
        write_class(root / "b", count)
        dataset = load(root)
        trained |= set(dataset.train.paths)
        assert not trained & set(dataset.test.paths)
        assert min(np.bincount(dataset.test.labels)) >= 1
    # The rule, in other words.
    hashed = [path for path in [*dataset.train.paths, *dataset.test.paths] if sha256(path.encode()).digest() < TENTH]
    assert sorted(hashed) == sorted(dataset.test.paths)


def test_without_class_folders_there_are_no_labels(root):
    write_class(root, 10)
    dataset = load(root)
    assert dataset.train is None
    assert (len(dataset.pretrain), len(dataset.test)) == (9, 1)
    assert dataset.pretrain.labels is dataset.test.labels is None
    assert dataset.classes == ()


def test_an_image_outside_the_classes_takes_the_labels_away(root):
    write_class(root / "a", 2)
    write_class(root / "b", 2)
    write(root / "stray.png")
    with pytest.warns(UserWarning, match=r"stray\.png is in no class folder"):
        assert load(root).train is None


def test_a_test_class_without_training_images_is_an_error(root):
    for name in ("train/a", "train/b", "test/a", "test/c"):
        write_class(root / name, 2)
    with pytest.raises(ValueError, match="training images lack: c"):
        load(root)


@pytest.mark.parametrize("inside", ["", "a/"])
def test_test_images_without_classes_leave_the_training_images_theirs(root, inside):
    for value, name in enumerate("ab"):
        write_class(root / "train" / name, 3, value)
    write_class(root / "test" / inside, 2)
    write_class(root / "test", 2)
    with pytest.warns(UserWarning, match=r"test/000\.png.* in no class folder, so the test images have no labels"):
        dataset = load(root)
    assert (dataset.classes, dataset.test.labels) == (("a", "b"), None)
    np.testing.assert_array_equal(dataset.train.labels, dataset.train.images[:, 0, 0, 0])
    assert len(dataset.test) == (4 if inside else 2)


@pytest.mark.parametrize(("train", "held"), [("train", 3), (".", 5)])
def test_unlabelled_images_are_trained_on_in_place_of_the_labelled_ones(root, train, held):
    for value, name in enumerate("ab"):
        write_class(root / train / name, 20, value)
    write_class(root / "unlabeled", 5, 200)
    (root / "unlabeled" / "001.png").write_bytes(b"")
    dataset = load(root)
    assert dataset.classes == ("a", "b")
    assert (len(dataset.pretrain), len(dataset.train), len(dataset.test)) == (4, 40 - held, held)
    assert dataset.pretrain.labels is None
    assert dataset.pretrain.images[:, 0, 0, 0].tolist() == [200] * 4
    for part in (dataset.train, dataset.test):
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0])
        assert [int(Path(p).stem) for p in part.paths] == part.images[:, 1, 0, 0].tolist()
    np.testing.assert_allclose(dataset.mean, [200 / 255, (0 + 2 + 3 + 4) / 4 / 255, 0], atol=1e-6)


def test_labelled_images_that_cannot_be_read_beside_unlabelled_ones_are_an_error(root):
    write_class(root / "unlabeled", 5)
    (root / "train").mkdir()
    (root / "train" / "0.png").touch()
    with pytest.raises(ValueError, match="none of the 1 training images could be read"):
        load(root)


def test_the_test_set_is_told(root):
    write_class(root / "a", 20)
    write_class(root / "b", 20)
    with pytest.warns(UserWarning, match=r"no folder of test images: 5 of 40 images, about a tenth of each class, are"):
        load(root)


def test_one_image_is_trained_on(root):
    write(root / "0.png", (1, 2, 3))
    dataset = load(root)
    assert (len(dataset.pretrain), dataset.test, dataset.train) == (1, None, None)


def test_a_test_class_of_another_case_is_told(root):
    for name in ("train/Cat", "train/Dog", "test/cat", "test/Dog"):
        write_class(root / name, 2)
    with pytest.raises(ValueError, match=r"training images lack: cat \(training: Cat, Dog; upper and lower case count"):
        load(root)


def test_training_images_that_cannot_be_read_are_told_with_their_reasons(root):
    for number in range(3):
        write(root / "test" / f"{number}.png")
    (root / "train").mkdir()
    (root / "train" / "0.png").touch()
    with pytest.raises(ValueError, match=r"none of the 1 training images .*\n.*\n.*the file is empty \(train/0\.png"):
        load(root)


def test_mixed_sizes_are_brought_to_one(root):
    write(root / "0.png", size=(200, 100))
    write(root / "1.png", size=(40, 70))
    assert load(root).image_shape == (3, 96, 96)
    assert load(root, image_size=32).image_shape == (3, 32, 32)


def test_one_size_is_kept(root):
    write(root / "0.png", size=(20, 10))
    write(root / "1.png", size=(20, 10))
    assert load(root).image_shape == (3, 10, 20)


def test_one_large_size_is_not_kept(root):
    for i in range(2):
        write(root / f"{i}.png", size=(400, 257))
    assert load(root).image_shape == (3, 96, 96)
    assert load(root, image_size=300).image_shape == (3, 300, 300)


def test_the_middle_is_kept(root):
    image = Image.new("RGB", (64, 16))
    image.paste((255, 0, 0), (24, 0, 40, 16))
    root.mkdir()
    image.save(root / "0.png")
    images = load(root, image_size=16).pretrain.images
    np.testing.assert_array_equal(images[0], np.array([255, 0, 0])[:, None, None] + np.zeros((3, 16, 16)))


def test_every_mode_becomes_rgb(root):
    colour = (200, 40, 90)
    gray = int(np.dot(colour, [0.299, 0.587, 0.114]))
    expected = {}
    for mode, suffix, value in (
        ("RGB", "png", colour),
        ("RGB", "bmp", colour),
        ("RGB", "webp", colour),
        ("RGB", "jpeg", colour),
        ("RGBA", "png", colour),
        ("P", "png", colour),
        ("L", "png", (gray,) * 3),
        ("LA", "png", (gray,) * 3),
        ("CMYK", "jpg", colour),
        ("1", "png", (0, 0, 0)),
    ):
        name = f"{len(expected):02}-{mode}.{suffix}"
        # Black and white dithers anything between; black stays black.
        write(root / name, (0, 0, 0) if mode == "1" else colour, mode=mode)
        expected[name] = value
    Image.fromarray(np.full((8, 8), 0x8042, np.uint16)).save(root / "16-bit.png")
    expected["16-bit.png"] = (0x80,) * 3
    dataset = load(root)
    parts = (dataset.pretrain, dataset.test)
    found = {path: image for part in parts for path, image in zip(part.paths, part.images, strict=True)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # JPEG, WebP and the palette's 216 colours are not exact.
        np.testing.assert_allclose(found[name][:, 4, 4].astype(int), value, atol=26, err_msg=name)


def test_exif_orientation_is_applied(root):
    root.mkdir()
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: what is left in the file belongs on top
    image.save(root / "0.png", exif=exif)
    (shown,) = load(root).pretrain.images
    assert shown.shape == (3, 16, 8)
    assert shown[:, :8].min() == 255
    assert shown[:, 8:].max() == 0


def test_broken_images_are_left_out_and_named(root):
    for split in ("train", "test"):
        for value, name in enumerate("ab"):
            write_class(root / split / name, 3, value)
    good = (root / "train/a/001.png").read_bytes()
    (root / "train/a/000.png").write_bytes(good[: len(good) // 2])
    (root / "train/b/002.png").write_bytes(b"")
    (root / "test/a/001.png").write_text("text")
    (root / "test/a/004.png").symlink_to("nowhere")
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(UserWarning, match=str(root)) as said:
            dataset = load(root)
        (message,) = said
        assert str(message.message).splitlines() == [
            f"{root}:",
            "  left out 4 images:",
            "    1: No such file or directory (test/a/004.png)",
            "    2: holds no image that Pillow recognises (train/a/000.png, test/a/001.png)",
            "    1: the file is empty (train/b/002.png)",
        ]
        assert (len(dataset.train), len(dataset.test)) == (4, 5)
        for part in (dataset.train, dataset.test):
            np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0])
            assert [int(Path(p).stem) for p in part.paths] == part.images[:, 1, 0, 0].tolist()


def test_nothing_readable_is_an_error(root, cache):
    root.mkdir()
    (root / "0.png").write_text("text")
    (root / "1.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"none of the 2 images could be read, first 1\.jpg: holds no image"):
        load(root)
    assert not list(cache.rglob("images.bin"))


def test_no_images_is_an_error(root):
    root.mkdir()
    (root / "notes.txt").write_text("text")
    write(root / ".hidden" / "0.png")
    write(root / "._0.png")
    with pytest.raises(ValueError, match=r"found no image .*\.png"):
        load(root)


def test_a_missing_folder_is_an_error(root):
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        load(root)


def test_a_file_is_no_folder(root):
    root.touch()
    with pytest.raises(NotADirectoryError):
        load(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_an_error(root):
    write_class(root / "a", 1)
    (root / "a").chmod(0)
    with pytest.raises(PermissionError, match="a"):
        load(root)


def test_decoded_once_until_the_tree_changes(root, cache, monkeypatch):
    write_class(root, 4)
    decoded = builds(monkeypatch)
    load(root)
    load(root)
    assert decoded == [4]
    write(root / "new.png")
    load(root)
    assert decoded == [4, 5]
    os.utime(root / "new.png", ns=(1, 1))
    load(root)
    assert decoded == [4, 5, 5]
    # There is one cache for each folder and size: earlier states are removed, other sizes are kept.
    assert len(list(cache.rglob("images.bin"))) == 1
    load(root, image_size=4)
    load(root)
    assert decoded == [4, 5, 5, 5]
    assert len(list(cache.rglob("images.bin"))) == 2


def test_an_interrupted_build_leaves_nothing(root, cache, monkeypatch):
    write_class(root, 4)

    def interrupt(files, out, image_size):
        out.write(b"half an image")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decode_cache, "decode_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(root)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]
    assert len(load(root).pretrain) == 3


def test_what_a_killed_build_left_is_replaced(root, cache):
    write_class(root, 4)
    load(root)
    (index,) = cache.rglob("index.json")
    built = index.parent
    leftover = built.with_name(built.name + ".building")
    built.rename(leftover)
    assert len(load(root).pretrain) == 3
    assert not leftover.exists()


def test_a_full_disk_is_told(root, cache):
    write_class(root, 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot keep the decoded images .*File too large.*CPC_EXT_CACHE"):
            load(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(load(root).pretrain) == 38


def test_a_cache_that_cannot_be_made_is_told(root, cache):
    write_class(root, 1)
    cache.touch()
    with pytest.raises(OSError, match="CPC_EXT_CACHE names another"):
        load(root)


def _load_and_report(root: Path, report: Path) -> None:
    original = decode_cache.decode_all

    def slow(*arguments):
        with report.open("a") as out:
            out.write("decoded\n")
        time.sleep(0.3)
        return original(*arguments)

    decode_cache.decode_all = slow
    dataset = load(root)
    with report.open("a") as out:
        out.write(json.dumps(len(dataset.pretrain)) + "\n")


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_decode_once(root, tmp_path, cache, damaged):
    write_class(root, 10)
    if damaged:
        load(root)
        (images,) = cache.rglob("images.bin")
        os.truncate(images, 100)
    report = tmp_path / "report"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_load_and_report, args=(root, report)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert sorted(report.read_text().split()) == ["9", "9", "decoded"]


def test_more_images_than_are_decoded_ahead(root, monkeypatch):
    monkeypatch.setattr("cpc_ext.data.images.decode.AHEAD", 8)
    write_class(root, 30)
    (root / "017.png").write_text("text")
    with pytest.warns(UserWarning, match=r"left out 1 images:\n.*recognises \(017\.png\)"):
        dataset = load(root)
    assert [int(Path(p).stem) for p in dataset.pretrain.paths] == dataset.pretrain.images[:, 1, 0, 0].tolist()
    assert len(dataset.pretrain) + len(dataset.test) == 29
