"""Search of trees for images to train and to test on, with all kinds of folder names, links and special files."""

import os
import socket
from pathlib import Path

import pytest
from PIL import features

from cpc_ext.data.file_tree import FileTree, split_of
from cpc_ext.data.images.image_tree import read_images


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def some(folder: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number}.png" for number in range(count)]


def split(tree: FileTree) -> tuple[set[str], set[str]]:
    """Return the folders of the training and of the test images."""
    return ({file.path.rpartition("/")[0] for file in tree.train}, {file.path.rpartition("/")[0] for file in tree.test})


def labels(tree: FileTree) -> dict[str, str]:
    """Return the class of each folder's images."""
    return {file.path.rpartition("/")[0]: file.label for file in (*tree.train, *tree.test)}


def said(tree: FileTree) -> str:
    return "\n".join([*tree.notes, *tree.left_out.lines()])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("TRAINING", "train"),
        ("trn", "train"),
        ("train_images", "train"),
        ("trainA", "train"),
        ("train2017", "train"),
        ("imagesTr", "train"),
        ("imagesTe", "test"),
        ("trainval", "train"),
        ("Test", "test"),
        ("testing", "test"),
        ("test-set", "test"),
        ("VAL", "validation"),
        ("Validation", "validation"),
        ("valid", "validation"),
        ("val_256", "validation"),
        ("eval", "validation"),
        ("trains", None),
        ("trainer", None),
        ("invalid", None),
        ("bus", None),
        ("image", None),
        ("2017", None),
        ("contest", None),
        ("train+test", None),
        ("train-clean-100", None),
        ("unlabelled_images", "unlabeled"),
    ],
)
def test_names_of_splits(name, expected):
    assert split_of(name) == expected


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "VAL"),
        ("trn", "eval"),
        ("training_set", "test_set"),
        ("inner/train", "inner/test"),
        ("a/b/Train", "a/b/valid"),
    ],
)
def test_splits_and_their_classes(root, train, test):
    for folder in (train, test):
        touch(root, *some(f"{folder}/x"), *some(f"{folder}/y"))
    tree = read_images(root)
    assert split(tree) == ({f"{train}/x", f"{train}/y"}, {f"{test}/x", f"{test}/y"})
    assert all(label == folder[-1] for folder, label in labels(tree).items())
    expected = (
        [] if (train, test) == ("train", "test") else [f"taken for training images: {train}; for test images: {test}"]
    )
    assert tree.notes == expected
    assert len(tree.left_out) == 0


def test_a_test_folder_comes_before_a_validation_folder(root):
    touch(root, *some("train/x"), *some("val/x", 3), *some("test/x"))
    tree = read_images(root)
    assert split(tree) == ({"train/x"}, {"test/x"})
    assert "for test images: test" in said(tree)
    assert "3: in a validation folder, as there is a test folder (val/x/0.png, val/x/1.png, val/x/2.png)" in said(tree)


def test_an_empty_test_folder_is_none(root):
    touch(root, *some("train/x"), *some("val/x"), "test/readme.txt")
    tree = read_images(root)
    assert split(tree) == ({"train/x"}, {"val/x"})
    assert "for test images: val" in said(tree)


def test_an_empty_training_folder_is_an_error(root):
    touch(root, *some("Test/x"), "Train/readme.txt")
    with pytest.raises(ValueError, match="found no image to train on in Train"):
        read_images(root)


def test_splits_within_classes(root):
    for name in ("cat", "dog"):
        touch(root, *some(f"{name}/train"), *some(f"{name}/test"))
    tree = read_images(root)
    assert split(tree) == ({"cat/train", "dog/train"}, {"cat/test", "dog/test"})
    assert labels(tree) == {f"{name}/{part}": name for name in ("cat", "dog") for part in ("train", "test")}
    assert "taken for training images: cat/train, dog/train; for test images: cat/test, dog/test" in said(tree)


def test_a_lone_split_of_a_class_counts_where_another_class_has_several(root):
    touch(root, *some("a/train"), *some("a/test"), *some("b", 3), *some("b/test"), *some("c/train"), *some("d/other"))
    tree = read_images(root)
    assert split(tree) == ({"a/train", "b", "c/train", "d/other"}, {"a/test", "b/test"})
    assert labels(tree) == {folder: folder[0] for folder in ("a/train", "a/test", "b", "b/test", "c/train", "d/other")}
    assert "taken for training images: a/train, c/train; for test images: a/test, b/test" in said(tree)


def test_lone_splits_of_classes_are_none_where_no_class_has_several(root):
    touch(root, *some("a/test"), *some("b/train"))
    assert split(read_images(root)) == ({"a/test", "b/train"}, set())


def test_splits_with_a_further_word(root):
    """As in LibriSpeech's root."""
    for part in ("train-clean-100", "train-other-500", "test-clean", "test-other", "dev-clean"):
        touch(root, *some(f"{part}/1/2"), *some(f"{part}/3/4"))
    touch(root, "SPEAKERS.TXT")
    tree = read_images(root)
    assert split(tree) == (
        {f"train-{words}" for words in ("clean-100/1/2", "clean-100/3/4", "other-500/1/2", "other-500/3/4")},
        {f"test-{words}" for words in ("clean/1/2", "clean/3/4", "other/1/2", "other/3/4")},
    )
    assert set(labels(tree).values()) == {"1", "3"}
    assert (
        "taken for training images: train-clean-100, train-other-500; for test images: test-clean, test-other"
        in said(tree)
    )
    assert "4: in a validation folder, as there is a test folder (dev-clean/1/2/0.png" in said(tree)


@pytest.mark.parametrize("test", ["test_clean", "val_clean", "dev.v2", "test"])
def test_splits_with_a_further_word_hold_the_classes(root, test):
    for part in ("train_clean", test):
        touch(root, *some(f"{part}/a"), *some(f"{part}/b"))
    tree = read_images(root)
    assert split(tree) == ({"train_clean/a", "train_clean/b"}, {f"{test}/a", f"{test}/b"})
    assert set(labels(tree).values()) == {"a", "b"}


@pytest.mark.parametrize("names", [("train_clean", "test_clean", "noise"), ("train_clean", "train_other")])
def test_what_may_be_splits_is_told(root, names):
    for name in names:
        touch(root, *some(name))
    tree = read_images(root)
    assert set(labels(tree).values()) == {*names}
    assert f"taken for a class: {', '.join(sorted({*names} - {'noise'}))}, beside" in said(tree)


def test_exact_names_of_splits_come_first(root):
    touch(root, *some("train/a"), *some("train_masks/a"), *some("test/a"))
    tree = read_images(root)
    assert split(tree) == ({"train/a"}, {"test/a"})
    assert "2: in no folder of training or test images, but beside them (train_masks/a/0.png" in said(tree)


@pytest.mark.parametrize("wrap", ["flowers", "archive/flowers", "train/images", "test/images"])
def test_classes_below_a_lone_folder(root, wrap):
    """As archives unpack."""
    touch(root, *some(f"{wrap}/daisy"), *some(f"{wrap}/rose/red"), *some(f"{wrap}/rose/white"))
    tree = read_images(root)
    assert labels(tree) == {f"{wrap}/daisy": "daisy", f"{wrap}/rose/red": "rose", f"{wrap}/rose/white": "rose"}
    assert f"taken for classes: the folders in {wrap}, beside which there is nothing" in said(tree)
    assert ("stands alone, so its images are trained on" in said(tree)) == wrap.startswith("test")


def test_splits_and_classes_below_lone_folders(root):
    for part in ("train", "test"):
        touch(root, *some(f"wrap/{part}/images/daisy"), *some(f"wrap/{part}/images/rose"))
    (root / "wrap" / "val").mkdir()
    tree = read_images(root)
    assert {folder: label for folder, label in labels(tree).items() if label != folder.rpartition("/")[2]} == {}
    assert split(tree)[1] == {"wrap/test/images/daisy", "wrap/test/images/rose"}
    assert "the folders in wrap/test/images, wrap/train/images, beside which" in said(tree)


def test_one_class_of_several_folders_is_one(root):
    touch(root, *some("flowers"), *some("flowers/daisy"), *some("flowers/rose"))
    tree = read_images(root)
    assert set(labels(tree).values()) == {"flowers"}
    assert "the only class is flowers, so there are no labels; the folders in it are taken for no classes" in said(tree)


@pytest.mark.parametrize("parts", [("train/x/a", "train/x/b", "test/a"), ("train/a", "train/b", "test/a/c")])
def test_folders_that_not_all_splits_have_are_classes(root, parts):
    for part in parts:
        touch(root, *some(part))
    tree = read_images(root)
    assert labels(tree) == {part: part.split("/")[1] for part in parts}
    assert ("the only class is x, so there are no labels" in said(tree)) == ("train/x/a" in parts)


def test_a_validation_folder_of_classes_comes_before_a_test_folder_without(root):
    touch(root, *some("train/a"), *some("train/b"), *some("val/a"), *some("val/b"), *some("test", 3))
    tree = read_images(root)
    assert split(tree) == ({"train/a", "train/b"}, {"val/a", "val/b"})
    assert "for test images: val" in said(tree)
    assert "3: in a test folder without classes, as a validation folder has them (test/0.png" in said(tree)


def test_a_test_folder_without_classes_is_one_where_nothing_has_classes(root):
    touch(root, *some("train"), *some("val"), *some("test"))
    assert split(read_images(root)) == ({"train"}, {"test"})


@pytest.mark.parametrize(
    "others", [("train/a", "train/b"), ("train",), ("train/a", "test/a"), ("a", "b"), ("train", "x")]
)
def test_unlabelled_folders_are_no_class(root, others):
    for folder in (*others, "unlabeled", "unlabeled/more"):
        touch(root, *some(folder))
    tree = read_images(root)
    assert [file.path for file in tree.unlabeled] == [*some("unlabeled"), *some("unlabeled/more")]
    assert "; without labels: unlabeled" in said(tree)
    assert {file.path.rpartition("/")[0] for file in (*tree.train, *tree.test)} == {*others}
    assert len(tree.left_out) == 0


def test_unlabelled_images_are_trained_on_where_there_are_no_others(root):
    touch(root, *some("unlabeled"), *some("test"))
    tree = read_images(root)
    assert (split(tree), tree.unlabeled) == (({"unlabeled"}, {"test"}), [])


def test_archives_within_archives(root):
    """As Kaggle's cats and dogs unpack."""
    touch(root, *some("training_set/training_set/cats"), *some("training_set/training_set/dogs"))
    touch(root, *some("test_set/test_set/cats"), *some("test_set/test_set/dogs"))
    tree = read_images(root)
    assert set(labels(tree).values()) == {"cats", "dogs"}
    assert (len(tree.train), len(tree.test)) == (4, 4)


def test_a_class_called_train_is_one(root):
    touch(root, *some("bus"), *some("car"), *some("train"))
    tree = read_images(root)
    assert labels(tree) == {"bus": "bus", "car": "car", "train": "train"}
    assert "taken for a class: train, beside bus, car" in said(tree)


def test_a_class_called_train_in_splits_is_one(root):
    for part in ("train", "test"):
        touch(root, *some(f"{part}/bus"), *some(f"{part}/train"), *some(f"{part}/test"))
    tree = read_images(root)
    assert set(labels(tree).values()) == {"bus", "train", "test"}
    assert (len(tree.train), len(tree.test)) == (6, 6)


def test_valid_and_invalid_are_classes(root):
    touch(root, *some("valid"), *some("invalid"))
    tree = read_images(root)
    assert set(labels(tree).values()) == {"valid", "invalid"}
    assert "taken for a class: valid" in said(tree)


def test_a_training_folder_of_classes_beside_other_folders(root):
    touch(root, *some("train/a"), *some("train/b"), *some("spare", 5), "loose.png")
    tree = read_images(root)
    assert labels(tree) == {"train/a": "a", "train/b": "b"}
    assert "left out 6 images" in said(tree)
    assert "6: in no folder of training or test images, but beside them (loose.png, spare/0.png" in said(tree)


def test_a_test_folder_of_classes_beside_the_classes(root):
    touch(root, *some("a"), *some("b"), *some("Test/a"), *some("Test/b"))
    tree = read_images(root)
    assert split(tree) == ({"a", "b"}, {"Test/a", "Test/b"})
    assert labels(tree) == {"a": "a", "b": "b", "Test/a": "a", "Test/b": "b"}
    assert "taken for training images: all others; for test images: Test" in said(tree)


@pytest.mark.parametrize("name", ["train", "Training", "test"])
def test_a_lone_split_holds_the_classes(root, name):
    touch(root, *some(f"{name}/a"), *some(f"{name}/b"))
    tree = read_images(root)
    assert labels(tree) == {f"{name}/a": "a", f"{name}/b": "b"}
    assert ("stands alone" in said(tree)) == (name == "test")


def test_classes_that_differ_in_case_are_told(root):
    touch(root, *some("Cat"), *some("cat"), *some("dog"))
    assert "only their case differs: Cat and cat" in said(read_images(root))


@pytest.mark.parametrize("links", [["a/up"], ["a/up", "b/up"], ["a/up", "b/up", "b/c/up", "up"]])
def test_links_upwards_add_nothing_and_end(root, links):
    touch(root, *some("a", 10), *some("b", 10), *some("b/c", 1))
    for link in links:
        depth = link.count("/")
        (root / link).symlink_to("/".join([".."] * depth) or ".")
    tree = read_images(root)
    assert len(tree.train) == 21
    assert f"hold it: {', '.join(sorted(links, key=lambda link: (link.count('/'), link)))}" in said(tree)


def test_a_link_above_the_tree_is_not_followed(root):
    touch(root.parent, *some("other", 7))
    touch(root, *some("a"))
    (root / "a" / "above").symlink_to("../..")
    tree = read_images(root)
    assert [file.path for file in tree.train] == some("a")
    assert "a/above" in said(tree)


def test_a_link_from_training_to_test_images_leaks_none(root):
    touch(root, *some("train/x"), *some("test/x", 3))
    (root / "train" / "all").symlink_to("..")
    (root / "train" / "more").symlink_to("../test")
    (root / "train" / "x" / "copy.png").symlink_to("../../test/x/0.png")
    os.link(root / "test" / "x" / "1.png", root / "train" / "x" / "hard.png")
    tree = read_images(root)
    met = [file.inode for file in (*tree.train, *tree.test)]
    assert len(met) == len(set(met)) == 5
    assert "2: another name of a file that is taken (" in said(tree)


def test_folders_of_links_into_a_common_store(root):
    """A split by links: the images themselves lie beside it and are not said to be left out."""
    touch(root, *some("all", 5), *some("store/cat"))
    for number, part in enumerate(("train/dog", "train/dog", "test/dog", "train/bird")):
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / part / f"{number}.png").symlink_to(f"../../all/{number}.png")
    (root / "train" / "cat").symlink_to("../store/cat")
    tree = read_images(root)
    assert split(tree) == ({"train/dog", "train/cat", "train/bird"}, {"test/dog"})
    assert [file.path for file in tree.train] == [
        "train/bird/3.png",
        *some("train/cat"),
        "train/dog/0.png",
        "train/dog/1.png",
    ]
    assert "1: in no folder of training or test images, but beside them (all/4.png)" in said(tree)


def test_a_link_counts_after_the_file_itself(root):
    touch(root, *some("b"))
    (root / "a").symlink_to("b")
    (root / "b" / "00.png").symlink_to("0.png")
    tree = read_images(root)
    assert [file.path for file in tree.train] == some("b")


def test_links_to_outside_are_followed_once(root):
    touch(root.parent, *some("elsewhere", 3))
    touch(root, *some("a"))
    for name in ("b", "c"):
        (root / name).symlink_to("../elsewhere")
    tree = read_images(root)
    assert [file.path for file in tree.train] == [*some("a"), *some("b", 3)]
    assert "hold it: c" in said(tree)


PICTURES = ["jfif", "jpe", "JPG", "jp2", "apng", "pbm", "pfm", "tga", "ico", "psd", "webp", "qoi", "mpo", "dds"]
NO_PICTURES = ["pdf", "eps", "mpg", "wmf", "h5", "fits", "fli", "txt", "csv", "mp4"]


def test_endings_that_pillow_reads(root):
    touch(root, *(f"a.{suffix}" for suffix in PICTURES + NO_PICTURES), "b")
    assert {file.path for file in read_images(root).train} == {f"a.{suffix}" for suffix in PICTURES}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF")
def test_avif_is_read(root):
    touch(root, "a.avif")
    assert [file.path for file in read_images(root).train] == ["a.avif"]


def test_images_of_types_that_pillow_does_not_read_are_told(root):
    touch(root, "a.png", "b.svg", "c.heic", "d.HEIC")
    tree = read_images(root)
    assert [file.path for file in tree.train] == ["a.png"]
    assert "2: .heic is not read by Pillow" in said(tree)
    assert "1: .svg is not read by Pillow" in said(tree)


def test_hidden_and_foreign_files_are_passed_over(root):
    touch(root, "a.png", ".hidden.png", "._a.png", ".DS_Store", "Thumbs.db", *some("@eaDir/a.png"), *some("__MACOSX"))
    touch(root, *some(".thumbnails"), *some("sub/@eaDir"))
    tree = read_images(root)
    assert [file.path for file in tree.train] == ["a.png"]
    assert "other programs: ._a.png, .hidden.png, .thumbnails, @eaDir, __MACOSX and 1 more" in said(tree)


def test_what_is_no_file_is_left_out(root):
    touch(root, "a.png")
    os.mkfifo(root / "fifo.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "s.png"))
    (root / "nowhere.png").symlink_to("missing")
    (root / "circle.png").symlink_to("circle.png")
    (root / "null.png").symlink_to(os.devnull)
    (root / "folder.png").mkdir()
    tree = read_images(root)
    assert [file.path for file in tree.train] == ["a.png"]
    assert "3: no file but a FIFO, a socket or a device (fifo.png, null.png, s.png)" in said(tree)
    assert "1: No such file or directory (nowhere.png)" in said(tree)
    assert "1: Too many levels of symbolic links (circle.png)" in said(tree)


def test_names_that_are_no_text(root):
    name = os.fsdecode(b"\xff\xfe.png")
    touch(root, name, os.fsdecode(b"k\xe4fer/1.png"))
    assert {file.path for file in read_images(root).train} == {name, os.fsdecode(b"k\xe4fer/1.png")}


def test_deep_trees(root):
    touch(root, "/".join(["d" * 50] * 60) + "/0.png")
    assert len(read_images(root).train) == 1


def test_the_order_is_files_then_folders_sorted(root):
    touch(root, "b/1.png", "b/a/2.png", "b/0.png", "a.png", "c/0.png", "z.png")
    expected = ["a.png", "z.png", "b/0.png", "b/1.png", "b/a/2.png", "c/0.png"]
    assert [file.path for file in read_images(root).train] == expected
    touch(root.parent, *some("outside", 1))
    (root / "b" / "link").symlink_to("../../outside")
    expected.insert(5, "b/link/0.png")
    assert [file.path for file in read_images(root).train] == expected


def test_without_splits_all_images_count(root):
    touch(root, *some("train/a"), *some("test/a"), *some("other"), "x.png")
    tree = read_images(root, splits=False)
    assert len(tree.train) == 7
    assert said(tree) == ""
