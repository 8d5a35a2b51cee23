"""Data sets given as Python objects: forms of items, where they are kept, and refused ones."""

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from cpc_ext.data import Dataset as ImageDataset
from cpc_ext.data import from_dataset, load_dataset, make_textures
from cpc_ext.data.images.given import keep_dataset
from tests.data.images.conftest import encoded, pictures

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:dataset:UserWarning")]
X, Y = pictures(30, 20, 18, 3), np.arange(30) % 3


class Pictures(Dataset):
    """A data set in torchvision's form. form: function that makes an item of an array and its label."""

    classes = ("ant", "bee", "cow")

    def __init__(self, form=lambda pixels, label: (Image.fromarray(pixels), label), images=X, labels=Y):
        self.form, self.images, self.labels = form, images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.form(self.images[index], int(self.labels[index]))


def pixels_and_labels(data):
    """The images [N, H, W, C] and labels of both parts, in the order of X."""
    images = np.concatenate([data.train.images, data.test.images]).transpose(0, 2, 3, 1)
    labels = np.concatenate([data.train.labels, data.test.labels])
    order = np.lexsort(images.reshape(len(images), -1).T[::-1])
    back = np.argsort(np.lexsort(X.reshape(len(X), -1).T[::-1]))
    return images[order][back], labels[order][back]


FORMS = {
    "Pillow": lambda pixels, label: (Image.fromarray(pixels), label),
    "tensor": lambda pixels, label: (torch.from_numpy(pixels).permute(2, 0, 1) / 255, torch.tensor(label)),
    "array": lambda pixels, label: [pixels, np.int64(label)],
    "bytes": lambda pixels, label: (encoded(pixels), label),
    "datasets": lambda pixels, label: {"image": Image.fromarray(pixels), "label": label},
    "CIFAR-100 of datasets": lambda pixels, label: {"img": pixels, "fine_label": label, "coarse_label": 0},
    "more": lambda pixels, label: (pixels, label, "caption", 7),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_items_in_every_form(form):
    data = from_dataset(Pictures(form))
    assert isinstance(data, ImageDataset)
    images, labels = pixels_and_labels(data)
    np.testing.assert_array_equal(images, X)
    np.testing.assert_array_equal(labels, Y)
    assert (len(data.train), len(data.test), data.classes) == (27, 3, ("ant", "bee", "cow"))
    assert sorted(data.test.labels) == [0, 1, 2]


def pairs():
    return [(pixels, label) for pixels, label in zip(X, Y, strict=True)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs())


@pytest.mark.parametrize(
    "dataset",
    [
        pairs(),
        (X, Y),
        (X, Y.tolist()),
        (torch.from_numpy(X), torch.from_numpy(Y)),
        (torch.from_numpy(X).permute(0, 3, 1, 2), Y.tolist() and Y),
        TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        iter(pairs()),
        Stream(),
    ],
    ids=[
        "list",
        "arrays",
        "array and list",
        "tensors",
        "channels first",
        "TensorDataset",
        "iterator",
        "IterableDataset",
    ],
)
def test_collections_of_every_kind(dataset):
    images, labels = pixels_and_labels(from_dataset(dataset))
    np.testing.assert_array_equal(images, X)
    np.testing.assert_array_equal(labels, Y)


def test_images_alone():
    for dataset in (X, torch.from_numpy(X), list(X), [Image.fromarray(pixels) for pixels in X]):
        data = from_dataset(dataset, test=X[:4])
        np.testing.assert_array_equal(data.pretrain.images, X.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(data.test.images, X[:4].transpose(0, 3, 1, 2))
        assert (data.train, data.test.labels, data.classes) == (None, None, ())


def test_classes_of_one_have_nothing_to_test_on():
    data = from_dataset([(X[0], "cat"), (X[1], "dog")])
    assert (len(data.train), data.test) == (2, None)


def test_grey_images_keep_one_channel():
    data = from_dataset(X[..., 0], test=X[..., 0])
    np.testing.assert_array_equal(data.pretrain.images, X[:, None, ..., 0])


def test_parts_that_are_given():
    data = from_dataset(Pictures(), (X[:5], Y[:5]), unlabeled=X[7:])
    assert [len(part) for part in (data.pretrain, data.train, data.test)] == [23, 30, 5]
    np.testing.assert_array_equal(data.train.labels, Y)
    np.testing.assert_array_equal(data.test.labels, Y[:5])
    np.testing.assert_array_equal(data.pretrain.images, X[7:].transpose(0, 3, 1, 2))


def test_a_mapping_of_splits():
    splits = {"train": (X[:20], Y[:20]), "validation": (X[20:24], Y[20:24]), "test": (X[24:], Y[24:])}
    data = from_dataset(splits)
    assert [len(part) for part in (data.train, data.test)] == [20, 6]
    del splits["test"]
    assert len(from_dataset(splits).test) == 4
    assert len(from_dataset(splits, (X[:2], Y[:2])).test) == 2
    with pytest.warns(UserWarning, match="test stands alone, so it is trained on"):
        assert len(from_dataset({"test": X}).pretrain) == 29
    with pytest.raises(ValueError, match="several of its splits are to train on, of cats, dogs"):
        from_dataset({"cats": X, "dogs": X})


def test_classes_by_whoever_knows_them():
    assert from_dataset(Subset(Pictures(), range(20))).classes == ("ant", "bee", "cow")
    assert from_dataset(Pictures(), classes=list("abcd")).classes == ("a", "b", "c", "d")
    assert from_dataset((X, Y + 5)).classes == ("5", "6", "7")
    named = [(pixels, "xyz"[label]) for pixels, label in pairs()]
    assert from_dataset(named).classes == ("x", "y", "z")

    class Features(Pictures):
        features = {"img": None, "label": class_label(["p", "q", "r"])}  # noqa: RUF012

    assert from_dataset(Features()).classes == ("p", "q", "r")
    with pytest.raises(ValueError, match=r"dataset: labels 2 are none of the 2 classes \(a, b\)"):
        from_dataset(Pictures(), classes=["a", "b"])
    with pytest.raises(ValueError, match="dataset: classes: expected a name for each, got several that are called cat"):
        from_dataset(Pictures(), classes=["cat", "cat", "dog"])


def class_label(names):
    """Return the feature by which Hugging Face's data sets declare a column of classes."""
    return type("ClassLabel", (), {"names": names})()


IMAGES = type("Image", (), {})()  # And of one of images.


class Columns:
    """A data set that declares the types of its columns, as Hugging Face's do."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.columns.items()}


@pytest.mark.parametrize("subset", [False, True])
def test_columns_of_images_and_classes_by_their_types(subset):
    columns = {"id": np.arange(len(X)), "photo": X, "species": Y}
    given = Columns(columns, {"id": object(), "photo": IMAGES, "species": class_label(["ant", "bee", "cow"])})
    data = from_dataset(Subset(given, range(len(X))) if subset else given)
    assert data.classes == ("ant", "bee", "cow")
    images, labels = pixels_and_labels(data)
    np.testing.assert_array_equal(labels, Y)
    np.testing.assert_array_equal(images, X)


def test_of_several_columns_of_a_type_the_usual_one_counts():
    columns = {"mask": X[::-1], "image": X, "coarse_label": Y % 2, "fine_label": Y}
    features = {
        "mask": IMAGES,
        "image": IMAGES,
        "coarse_label": class_label(["x", "y"]),
        "fine_label": class_label(["ant", "bee", "cow"]),
    }
    with pytest.warns(UserWarning, match="labels are taken from column fine_label, and not from coarse_label") as told:
        data = from_dataset(Columns(columns, features))
    assert "images are taken from column image, and not from mask" in str(told[0].message)
    assert data.classes == ("ant", "bee", "cow")
    np.testing.assert_array_equal(pixels_and_labels(data)[0], X)


def test_classes_of_a_data_set_that_have_the_same_name_get_their_numbers():
    class Birds(Pictures):
        classes = (("crane",), ("crow",), ("crane",))

    data = from_dataset(Birds())
    assert data.classes == ("('crane',) 0", "('crow',)", "('crane',) 2")
    np.testing.assert_array_equal(pixels_and_labels(data)[1], Y)


def test_a_test_part_with_classes_of_its_own():
    """As an ImageFolder of torchvision has, where a class is missing from the test folder."""

    class Lacking(Pictures):
        classes = ("ant", "cow")

    data = from_dataset(Pictures(), Lacking(images=X[:4], labels=[0, 1, 1, 0]))
    assert data.classes == ("ant", "bee", "cow")
    assert data.test.labels.tolist() == [0, 2, 2, 0]
    given = from_dataset(Pictures(), Lacking(images=X[:4], labels=[0, 1, 1, 0]), classes=["a", "b", "c"])
    assert given.test.labels.tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="labels bee are none of the 2 classes"):
        from_dataset(Lacking(labels=np.arange(30) % 2), Pictures())


def test_an_image_that_is_handed_over_stays_as_large_as_it_was(tmp_path):
    path = tmp_path / "large.jpg"
    Image.fromarray(pictures(1, 256, 256, 3)[0]).save(path)
    with Image.open(path) as image:
        from_dataset([image, image], test=X, image_size=32)
        assert image.size == (256, 256)


class Stream(IterableDataset):
    def __len__(self):
        return 20

    def __iter__(self):
        return zip(X[:20], Y[:20], strict=True)


def test_a_stream_is_read_once_whatever_the_workers():
    data = from_dataset(Stream(), workers=2)
    assert len(data.train) + len(data.test) == 20
    assert len(np.unique(np.concatenate([data.train.images, data.test.images]), axis=0)) == 20


def test_sizes():
    mixed = [Image.fromarray(pictures(1, side, 40, 3)[0]) for side in (30, 50)]
    assert from_dataset(mixed, test=mixed).image_shape == (3, 96, 96)
    assert from_dataset(mixed, test=mixed, image_size=24).image_shape == (3, 24, 24)
    assert from_dataset(X, test=pictures(3, 40, 40, 3)).image_shape == (3, 96, 96)
    assert from_dataset(pictures(2, 257, 300), test=X[:1, ..., 0]).image_shape == (1, 96, 96)
    with pytest.raises(ValueError, match="an iterator cannot be read again: give image_size"):
        from_dataset(iter(mixed))
    with pytest.raises(ValueError, match="image_size: expected at least 1 pixel, got 0"):
        from_dataset(X, image_size=0)


def where(pixels, label):
    return pixels, "here" if torch.utils.data.get_worker_info() is None else "in a worker"


def test_workers_read_the_same():
    assert [from_dataset(Pictures(where), (X[:2], ["there"] * 2), classes=["here", "in a worker", "there"], workers=n)
            .train.labels[0] for n in (0, 1)] == [0, 1]  # fmt: skip
    alone, helped = keep_dataset(Pictures()), keep_dataset(Pictures(FORMS["tensor"]), workers=1)
    assert alone == helped  # Named by content.


def test_what_is_kept_is_there_once_and_is_a_data_set_of_files(cache):
    first, second = keep_dataset(Pictures()), keep_dataset(pairs(), classes=Pictures.classes)
    assert first == second
    assert keep_dataset((X[1:], Y[1:])) != first
    assert len([path for path in (cache / "given").iterdir() if path.is_dir()]) == 2
    data = load_dataset("npy", first)
    np.testing.assert_array_equal(data.train.images, from_dataset(Pictures()).train.images)
    assert isinstance(data.train.images, np.memmap)
    sizes = [(first / f"{part}_images.npy").stat().st_size for part in ("train", "test")]
    assert sizes == [128 + 27 * 20 * 18 * 3, 128 + 3 * 20 * 18 * 3]


def test_what_a_killed_process_left_is_removed(cache):
    (cache / "given" / ".writing").mkdir(parents=True)
    (cache / "given" / ".writing" / "other_images.npy").write_bytes(b"half")
    assert sorted(path.name for path in keep_dataset(X, X).iterdir()) == ["test_images.npy", "train_images.npy"]
    with pytest.raises(RuntimeError, match="broken"):
        keep_dataset(Pictures(broken))
    assert not (cache / "given" / ".writing").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, cache, monkeypatch):
    cache.write_text("a file where the folder is to be")
    message = r"cannot keep the images in .*cache/given \(Not a directory\); CPC_EXT_CACHE names another"
    with pytest.raises(OSError, match=message):
        keep_dataset(X)
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "small"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot keep the images in .*small/given \(File too large\)"):
            keep_dataset(X)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in (tmp_path / "small" / "given").iterdir()] == [".lock"]
    keep_dataset(X)


def test_a_disk_that_is_full_at_the_last_is_told(cache):
    """Labels take so little room that NumPy would leave them in a buffer, and lose them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot keep the images in .*given \(File too large\)"):
            keep_dataset((X[:, :2, :2, :1], Y))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in (cache / "given").iterdir()] == [".lock"]


def broken(pixels, label):
    raise RuntimeError("broken")


def test_our_own_data_sets():
    textures = ImageDataset(
        "t", *(make_textures(20, split=split, size=16) for split in ("train", "train", "test")), tuple("0123456789"),
        (0.5,) * 3, (0.2,) * 3, 0.5, 0.2,
    )  # fmt: skip
    data = from_dataset(textures)
    np.testing.assert_array_equal(data.train.images, textures.train.images)
    np.testing.assert_array_equal(data.test.labels, textures.test.labels)
    assert len(data.pretrain) == 20
    assert data.classes == textures.classes


def test_labels_that_are_none_are_passed_over():
    boxes = [(pixels, {"boxes": [1]}) for pixels in X]
    with pytest.warns(UserWarning, match=r"labels that are neither integers nor names are passed over \(dict\)"):
        assert from_dataset(boxes).train is None


def test_a_label_of_minus_one_is_none():
    """As torchvision has it, of STL-10's unlabelled images among others: it is no class more."""
    with pytest.warns(UserWarning, match="15 of 30 images have no label, so none has"):
        assert from_dataset((X, np.where(np.arange(30) % 2, Y, -1))).train is None
    assert from_dataset((X, np.full(30, -1))).classes == ()


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        (7, TypeError, "expected what has a length and items, .* got int"),
        ("photos", TypeError, r'got str; files are opened by their kind: load_dataset\("folder", path\)'),
        (Path("photos"), TypeError, r"got \w*Path; files are opened by their kind"),
        (DataLoader(Pictures()), TypeError, r"got a DataLoader, whose items are batches: give its \.dataset"),
        ([], ValueError, r"expected images, got none \(train\)"),
        (
            [(X[0], 0), ("cat.png", 0)],
            ValueError,
            r"item 1 \(train\): expected .* the text 'cat\.png'; .* as pathlib",
        ),
        ([X[0], X[1] * 2.0], ValueError, r"item 1 \(train\): floating point has values"),
        ([X[0], X[1, ..., 0]], ValueError, r"item 1 \(train\): 1 channels, the images before it have 3"),
        ([X[0], b"\xff\xd8\xff"], ValueError, r"item 1 \(train\): "),
        (
            [{"caption": "cat"}],
            ValueError,
            r"item 0 \(train\): has no image: expected one of the keys image, .*, got capt",
        ),
        ([()], ValueError, r"item 0 \(train\): is empty"),
        ((X, Y[:3]), ValueError, "30 images, 3 labels"),
        (
            X[0],
            ValueError,
            r"shape \[20, 18, 3\], which is that of one image: give all images as one array \[N, H, ",
        ),
        ((X[0], X[1]), ValueError, r"shape \[20, 18, 3\], which is that of one image"),
        ((torch.from_numpy(X[0]), [0] * 20), ValueError, r"shape \[20, 18, 3\], which is that of one image"),
        ({"train": X, "test": X[0]}, ValueError, r"shape \[20, 18, 3\], which is that of one image"),
        (tuple(X[:2].transpose(0, 3, 1, 2)), ValueError, r"expected images and labels \[N\], got .* \[3, 20, 18\]"),
        ([(X[0], 0), (X[1], "ant")], ValueError, "some labels are numbers, others names"),
        ({"test": X, "val": X}, ValueError, "there is nothing to train on, by the names: test, val"),
        ({}, ValueError, "there is nothing to train on, by the names: none"),
    ],
)
def test_what_is_refused(dataset, kind, message, cache):
    with pytest.raises(kind, match=message):
        from_dataset(dataset)
    assert not [path for path in (cache / "given").glob("*") if path.is_dir()]


def test_parts_of_other_colours_are_refused():
    with pytest.raises(ValueError, match=r"as many channels everywhere, .*: train \[3, 20, 18\], test \[1, 20, 18\]"):
        from_dataset(X, test=X[..., 0])
