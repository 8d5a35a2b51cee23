"""Data sets given as Python objects, with a length and items, and kept as files of arrays that a run can name.

A run must find its images again to be resumed, evaluated or repeated, when the object no longer exists. So the images
are read once and written to the user's cache, as arrays that ``--dataset npy`` reads, in a folder named by a digest of
their content: the same data are stored once, whatever object they come from.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from cpc_ext.data.cache import cache_dir, sync_file, sync_folder
from cpc_ext.data.images.arrays import npy
from cpc_ext.data.images.columns import of_type
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.decode import RowWriter, SizeNotKept, reason_of
from cpc_ext.data.images.decode_cache import DEFAULT_SIZE
from cpc_ext.data.images.labels import Label, class_indices, plain_label
from cpc_ext.data.images.pixels import check_several, to_pixels
from cpc_ext.data.images.samples import move_to_end
from cpc_ext.data.images.source_files import parts_of
from cpc_ext.data.notice import tell
from cpc_ext.data.npy_file import write_npy
from cpc_ext.data.splits import held_out

__all__ = ["NAME", "from_dataset", "given_side", "keep_dataset"]

# The name of the data set that reads the kept arrays.
NAME = "npy"
# Keys of images and of labels in items that are mappings, in order of preference.
_IMAGE_KEYS = ("image", "img", "images", "pixel_values", "x", "jpg", "jpeg", "png")
_LABEL_KEYS = ("label", "labels", "fine_label", "target", "class", "cls", "y")
# Bytes of the header of an array of four axes in NumPy's format, whatever its length.
_HEADER_BYTES = 128


def from_dataset(
    dataset: Any,
    test: Any = None,
    *,
    unlabeled: Any = None,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    workers: int = 0,
) -> Dataset:
    """Make a Dataset of any data set of images, or of images and labels, given as a Python object.

    dataset: anything with a length and items, such as a ``torch.utils.data.Dataset``, one of torchvision or of Hugging
        Face's ``datasets``, a list, or an array [N, ...]; or an iterable; or a pair of arrays, images [N, ...] and
        labels [N]; or a mapping of splits to any of these. An item is an image, a tuple that begins with image and
        label, or a mapping with keys such as "image" and "label", or with the columns that ``datasets`` declares as
        images and class labels. An image is a Pillow image, the Path or the bytes of an image file, or an array [H, W],
        [H, W, C] or [C, H, W] with C 1 or 3: integers from 0 to 255 or floating point from 0 to 1, not normalised. A
        label is an integer or a name; others are ignored.
    test: the same, to test on. None: a tenth of each class is held out.
    unlabeled: the same, to train on in place of `dataset`, which probes then learn from.
    classes: class names, if labels are integers. None: the data set's ``classes``, or the names of a class label of
        ``datasets``.
    image_size: side in pixels; the shorter side is resized to it and the middle square kept. None: the images' own size
        if it is the same for all and the shorter side has at most 256 pixels, else 96.
    workers: number of processes that read items, as a DataLoader's num_workers. 0: this process. Iterables are always
        read by this process.

    Items are read once and kept in the user's cache (``CPC_EXT_CACHE``). A random augmentation in the data set would
    therefore be drawn only once; use the model's options instead. Raises TypeError or ValueError for an invalid item,
    with its number, OSError if the cache cannot be written, and whatever the data set itself raises.
    """
    folder = keep_dataset(dataset, test, unlabeled=unlabeled, classes=classes, image_size=image_size, workers=workers)
    return npy.load(folder)


def keep_dataset(
    dataset: Any,
    test: Any = None,
    *,
    unlabeled: Any = None,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    size_of_many: int | None = None,
    workers: int = 0,
) -> Path:
    """Keep a data set as a folder of arrays for ``--dataset npy``, and return the folder.

    size_of_many: side in pixels of images that cannot keep their own size, in place of 96.

    For other arguments and errors, see :func:`from_dataset`.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    given = _Given.of(dataset, test, unlabeled, classes)
    home = cache_dir() / "given"
    aside = home / ".writing"
    lock = FileLock(home / ".lock")
    with _saying_where(home):
        home.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        # Everything here is left from an interrupted process.
        shutil.rmtree(aside, ignore_errors=True)
        with _saying_where(home):
            aside.mkdir()
        try:
            _write(given, aside, image_size, workers)
        except SizeNotKept:
            given.require_again()
            _write(given, aside, size_of_many or DEFAULT_SIZE, workers)
        with _saying_where(home):
            folder = home / _digest(aside)
            if not folder.is_dir():
                sync_folder(aside)
                aside.rename(folder)
                sync_folder(home)
        return folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()


def given_side(dataset: Any) -> int | None:
    """Return the shorter side in pixels of a data set's first image, as a hint, or None if it cannot be read.

    An iterator, which can be read only once, is not touched.
    """
    try:
        train = _Given.of(dataset, None, None, None).train
        if isinstance(train, ImageSet):
            return int(min(train.images.shape[-2:]))
        if isinstance(train, tuple):
            train = train[0]
        # _items is not used here, because its DataLoader draws from PyTorch's generator.
        pixels = _Convert.of(train, None)(train[0]).pixels
    except Exception:  # The user's code may raise anything; keep_dataset reports what is wrong.
        return None
    return None if isinstance(pixels, str) else min(pixels.shape[:2])


@contextmanager
def _saying_where(place: Path) -> Iterator[None]:
    """Within the block, make an OSError say where images cannot be kept, and how to keep them elsewhere."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # The latter from file systems without locks.
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        said = f"cannot keep the images in {place} ({reason}); CPC_EXT_CACHE names another cache folder"
        raise (OSError(said) if number is None else OSError(number, said)) from error


@dataclass
class _Given:
    """The given parts of a data set, with class names where these are known, and notes for the user."""

    train: Any
    test: Any = None
    unlabeled: Any = None
    classes: Sequence[str] = ()
    test_classes: Sequence[str] = ()  # The test part's own class names; empty if the caller names the classes.
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, dataset: Any, test: Any, unlabeled: Any, classes: Sequence[str] | None) -> _Given:
        if isinstance(dataset, Dataset):
            labelled = dataset.train is not None
            extra = dataset.pretrain if labelled and dataset.train is not dataset.pretrain else None
            given = cls(dataset.train or dataset.pretrain, dataset.test, extra, dataset.classes)
        elif isinstance(dataset, Mapping):
            parts = parts_of((str(name), part) for name, part in dataset.items())
            for name, several in (("train", parts.train), ("test", parts.test), ("unlabeled", parts.unlabeled)):
                if len(several) > 1:
                    raise ValueError(f"dataset: several of its splits are to {name} on, of {', '.join(dataset)}")
            given = cls(
                train=parts.train[0],
                test=next(iter(parts.test), None),
                unlabeled=next(iter(parts.unlabeled), None),
                notes=parts.notes,
            )
        else:
            given = cls(dataset)
        given.test = given.test if test is None else test
        given.unlabeled = given.unlabeled if unlabeled is None else unlabeled
        if classes is None:
            given.test_classes = _distinct(str(name) for name in _classes(given.test))
            given.classes = _distinct(str(name) for name in given.classes or _classes(given.train))
        else:
            given.classes = [str(name) for name in classes]
        notes: list[str] = []
        for part in (given.train, given.test, given.unlabeled):
            _columns(part, notes)
        given.notes = [*given.notes, *dict.fromkeys(notes)]
        return given

    def require_again(self) -> None:
        """Raise ValueError if the images cannot be read a second time."""
        for part in (self.train, self.test, self.unlabeled):
            if isinstance(part, Iterator):
                raise ValueError(
                    "dataset: its images differ in size or are large, and an iterator cannot be read again: give "
                    "image_size"
                )


class _Item(NamedTuple):
    """A converted item, as a worker returns it.

    pixels: uint8 [H, W, C], or the reason why there are none. label: the label, or None. strange: the type of an
    invalid label.
    """

    pixels: np.ndarray | str
    label: Label = None
    strange: str = ""


@dataclass(frozen=True)
class _Convert:
    """Converts an item to what is kept of it; sent to workers.

    image_keys, label_keys: keys of images and labels in items that are mappings, in order of preference.
    """

    image_size: int | None
    image_keys: tuple[str, ...] = _IMAGE_KEYS
    label_keys: tuple[str, ...] = _LABEL_KEYS

    @classmethod
    def of(cls, dataset: Any, image_size: int | None) -> _Convert:
        image, label = _columns(dataset, [])
        return cls(
            image_size,
            _IMAGE_KEYS if image is None else (image, *_IMAGE_KEYS),
            _LABEL_KEYS if label is None else (label, *_LABEL_KEYS),
        )

    def __call__(self, item: Any) -> _Item:
        image, label = item, None
        if isinstance(item, Mapping):
            image = next((item[key] for key in self.image_keys if key in item), None)
            label = next((item[key] for key in self.label_keys if key in item), None)
            if image is None:
                return _Item(
                    f"has no image: expected one of the keys {', '.join(_IMAGE_KEYS)}, got {', '.join(map(str, item))}"
                )
        elif isinstance(item, tuple | list):
            if not item:
                return _Item("is empty")
            image, label = item[0], item[1] if len(item) > 1 else None
        try:
            pixels = to_pixels(image, self.image_size)
        except Exception as error:  # Damaged bytes make Pillow's readers raise nearly anything.
            return _Item(reason_of(error))
        try:
            return _Item(pixels, plain_label(label))
        except (TypeError, ValueError):
            return _Item(pixels, None, type(label).__name__)


@dataclass
class _Labels:
    """The labels of a part, and the types of invalid labels."""

    known: list[Label] = field(default_factory=list)
    strange: set[str] = field(default_factory=set)


def _write(given: _Given, folder: Path, image_size: int | None, workers: int) -> None:
    """Write the arrays of all parts. Raises SizeNotKept as RowWriter does, ValueError if parts do not fit together."""
    shapes, labels = {}, {"test": _Labels()}
    for part in ("train", "test", "unlabeled"):
        dataset = getattr(given, part)
        if dataset is not None:
            labels[part], shapes[part] = _write_part(dataset, part, folder, image_size, workers)
    if len({shape[1:] for shape in shapes.values()}) > 1:
        if image_size is None and len({shape[1] for shape in shapes.values()}) == 1:
            raise SizeNotKept
        said = ", ".join(f"{part} {list(shape[1:])}" for part, shape in shapes.items())
        raise ValueError(f"dataset: expected images of as many channels everywhere, got [C, H, W]: {said}")
    notes = [*given.notes]
    strange = sorted(set().union(*(each.strange for each in labels.values())))
    if strange:
        notes.append(f"labels that are neither integers nor names are passed over ({', '.join(strange)})")
    train, test = labels["train"].known, labels["test"].known
    if given.classes and list(given.test_classes) not in ([], list(given.classes)):
        # The same number may stand for another class in the test part.
        own = dict(enumerate(given.test_classes))
        test = [own.get(label, label) if isinstance(label, int) else label for label in test]
    if given.test is None:
        chosen = held_out(train, [*map(str, range(len(train)))])
        with _saying_where(folder.parent):
            order = _hold_out(folder, shapes["train"], chosen)
        ordered = [train[i] for i in order]
        train, test = ordered[: len(order) - len(chosen)], ordered[len(order) - len(chosen) :]
        if chosen:
            said = (
                f"nothing to test on: {len(chosen)} of {len(order)} images, about a tenth of each class, are held out"
            )
            notes.append(said)
    try:
        found = class_indices(train, test, given.classes, notes=notes)
    except ValueError as error:
        raise ValueError(f"dataset: {error}") from None
    if found.names:
        arrays = {"train_labels": found.train, "test_labels": found.test if test else None, "classes": found.names}
        for name, array in arrays.items():
            if array is not None:
                _save(folder / f"{name}.npy", np.asarray(array))
    tell("dataset", notes)


def _write_part(
    dataset: Any, part: str, folder: Path, image_size: int | None, workers: int
) -> tuple[_Labels, tuple[int, ...]]:
    """Write a part's images to a file. Returns its labels and the shape [N, C, H, W] of the images."""
    labels = _Labels()
    with _closed((folder / f"{part}_images.npy").open("wb")) as out:
        out.write(b"\0" * _HEADER_BYTES)
        rows = RowWriter(out, image_size)
        total = len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, tuple) else None
        items = _items(dataset, _Convert.of(dataset, image_size), workers)
        for number, item in enumerate(tqdm(items, f"reading {part}", total, unit="image", disable=None)):
            if isinstance(item.pixels, str):
                raise ValueError(f"dataset: item {number} ({part}): {item.pixels}")
            try:
                with _saying_where(folder.parent):
                    rows.append(item.pixels)
            except ValueError as error:
                raise ValueError(f"dataset: item {number} ({part}): {error}") from None
            labels.known.append(item.label)
            if item.strange:
                labels.strange.add(item.strange)
        if not rows.count:
            raise ValueError(f"dataset: expected images, got none ({part})")
        shape = (rows.count, *rows.shape)
        with _saying_where(folder.parent):
            out.seek(0)
            out.write(_header(shape))
            out.flush()
    return labels, shape


@contextmanager
def _closed(file: BinaryIO) -> Iterator[BinaryIO]:
    """Close the file after the block, keeping the block's error: closing would fail again to write what is left."""
    try:
        yield file
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    file.close()


def _items(dataset: Any, convert: Callable[[Any], _Item], workers: int) -> Iterable[_Item]:
    """Return the converted items of a data set."""
    if isinstance(dataset, ImageSet):
        known = [None] * len(dataset) if dataset.labels is None else dataset.labels.tolist()
        return map(convert, zip((row.transpose(1, 2, 0) for row in dataset.images), known, strict=True))
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset: expected a data set, got a DataLoader, whose items are batches: give its .dataset")
    if _is_array(dataset):
        _check_images(dataset)
        return map(convert, dataset)
    if isinstance(dataset, tuple) and len(dataset) == 2 and _is_array(dataset[0]) and hasattr(dataset[1], "__len__"):
        images, labels = dataset
        _check_images(images)
        shape = tuple(labels.shape) if _is_array(labels) else ()
        if len(shape) > 2 and np.prod(shape) > len(labels):
            raise ValueError(
                f"dataset: expected images and labels [N], got labels of shape {list(shape)}: images alone are given "
                "as one array [N, ...] or as a list"
            )
        if len(images) != len(labels):
            raise ValueError(f"dataset: {len(images)} images, {len(labels)} labels")
        return map(convert, zip(images, labels, strict=True))
    in_order = isinstance(dataset, IterableDataset)  # Every worker would give all of its items.
    if (
        not in_order
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, str | bytes)
    ):
        loader: Iterable[_Item] = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=convert)
        return loader
    if isinstance(dataset, Iterable) and not isinstance(dataset, str | bytes):
        return map(convert, dataset)
    files = ""
    if isinstance(dataset, str | Path):
        files = '; files are opened by their kind: load_dataset("folder", path), fit(dataset="folder", data_dir=path)'
    raise TypeError(
        "dataset: expected what has a length and items, an array or a mapping of these, got "
        f"{type(dataset).__name__}{files}"
    )


def _check_images(images: Any) -> None:
    """Raise ValueError if an array of images is a single image."""
    try:
        check_several(images.shape)
    except ValueError as error:
        raise ValueError(f"dataset: {error}") from None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)


def _classes(dataset: Any) -> Sequence[str]:
    """Return a data set's own class names, or () if it has none."""
    for whole in _wholes(dataset):
        features = getattr(whole, "features", None)
        if isinstance(features, Mapping):
            label = _columns(whole, [])[1]
            return () if label is None else getattr(features[label], "names", ())
        classes = getattr(whole, "classes", None)
        if isinstance(classes, list | tuple):
            return classes
    return ()


def _columns(dataset: Any, notes: list[str]) -> tuple[str | None, str | None]:
    """Return the columns of images and of labels of a data set that declares types, as Hugging Face's do.

    A column is None if none has such a type. notes: receives a remark if several columns have it.
    """
    for whole in _wholes(dataset):
        features = getattr(whole, "features", None)
        if isinstance(features, Mapping):
            kinds = {str(name): type(feature).__name__ for name, feature in features.items()}
            return of_type("Image", kinds, _IMAGE_KEYS, notes), of_type("ClassLabel", kinds, _LABEL_KEYS, notes)
    return None, None


def _wholes(dataset: Any) -> Iterator[Any]:
    """Yield a data set, and the data sets of which it is a subset."""
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "dataset", None)


def _distinct(names: Iterable[str]) -> list[str]:
    """Append numbers to class names that occur several times, as ImageNet's cranes do."""
    names = list(names)
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} {number}" for number, name in enumerate(names)]


def _hold_out(folder: Path, shape: tuple[int, ...], chosen: set[int]) -> list[int]:
    """Move the chosen training images to a file of test images. Returns the new order of all images."""
    path = folder / "train_images.npy"
    images = np.load(path, mmap_mode="r+")
    order = move_to_end(images, chosen)
    count = len(images) - len(chosen)
    if chosen:
        _save(folder / "test_images.npy", images[count:])
    images.flush()
    del images
    with path.open("r+b") as file:
        file.write(_header((count, *shape[1:])))
        file.truncate(_HEADER_BYTES + count * int(np.prod(shape[1:])))
    return order


def _save(path: Path, array: np.ndarray) -> None:
    with _saying_where(path.parent.parent), path.open("wb") as file:
        write_npy(file, array)


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file of uint8. NumPy leaves room in it for the first axis to grow."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert header.tell() == _HEADER_BYTES
    return header.getvalue()


def _digest(folder: Path) -> str:
    """Force the files in a folder to disk, and return a digest of them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        sync_file(path)
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
