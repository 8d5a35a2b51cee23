"""A data set made of arrays, whose names say which of them hold images and which hold labels.

Arrays of uint8 with channels first or last are viewed without a copy. Other types and sizes, and arrays of which a part
is to be held out, are converted once into the cache (see samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.decode import KEPT_SIZE
from cpc_ext.data.images.labels import Label, class_indices, plain_label
from cpc_ext.data.images.pixels import channel_axis, check_range, check_several, to_levels
from cpc_ext.data.images.samples import Sample, Source, dataset_of, load_source
from cpc_ext.data.images.source_files import Part, Parts, SourceFiles, in_words, parts_of, split_in, words_and_numbers
from cpc_ext.data.notice import tell
from cpc_ext.data.splits import held_out

__all__ = ["arrays_dataset", "codes_dataset", "named_arrays"]

_IMAGES = {"x", "image", "images", "img", "imgs", "data", "inputs", "pixels"}
_LABELS = {"y", "label", "labels", "target", "targets", "class"}
# Images read at a time from arrays that are not in memory.
_BLOCK = 64


class _Part(NamedTuple):
    """An array of images, [N, ...], of NumPy or h5py, and their labels."""

    name: str
    images: Any
    labels: list[Label]


def named_arrays(files: SourceFiles, path: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of a file by names unique among all files: with the file's name before, unless it is alone.

    path: path of the file. arrays: the arrays by their names in the file, "" for the only one of a .npy file.
    """
    stem = path.rpartition(".")[0]
    alone = len(files.files) == 1
    return {(name if alone and name else f"{stem}/{name}".rstrip("/")): array for name, array in arrays.items()}


def arrays_dataset(
    name: str, source: SourceFiles, arrays: Mapping[str, Any], image_size: int | None, reader: tuple[str, str]
) -> Dataset:
    """Make a data set of arrays with names such as "train_images", "x_test" or "labels".

    name: name of the data set. arrays: the arrays by name. image_size: see the loader of a folder.
    reader: the library that reads the arrays, and its version.

    Raises ValueError if the arrays do not fit together or hold no images, OSError if the cache cannot be written.
    """
    place = source.place
    try:
        parts, classes = _sorted_out(arrays)
        notes = [*source.notes, *parts.notes]
        used = [*parts.train, *parts.test, *parts.unlabeled]
        views = {part.name: _view(part.images, image_size) for part in used}
        shapes = {None if view is None else view.shape[1:] for view in views.values()}
        single = len(parts.train) == len(parts.test) == 1 and len(parts.unlabeled) <= 1
        if single and len(shapes) == 1 and None not in shapes:
            train, test = parts.train[0], parts.test[0]
            found = class_indices(train.labels, test.labels, classes, notes=notes)
            tell(place, notes)
            unlabeled = views[parts.unlabeled[0].name] if parts.unlabeled else None
            return dataset_of(name, _known(views[train.name]), views[test.name], found, unlabeled=unlabeled)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return load_source(
        Source(
            name=name,
            root=source.root,
            files=source.files,
            train=partial(_samples, place, parts.train),
            test=partial(_samples, place, parts.test) if parts.test else None,
            unlabeled=partial(_samples, place, parts.unlabeled) if parts.unlabeled else None,
            classes=lambda: classes,
            reader=reader,
            notes=notes,
        ),
        image_size,
    )


def codes_dataset(name: str, source: SourceFiles, arrays: Mapping[str, Any]) -> Dataset:
    """Make a data set of arrays of codes: integers whose values are kept. Names have the same meaning as for images.

    Raises ValueError if the arrays do not fit together or hold no codes.
    """
    place = source.place
    try:
        parts, classes = _sorted_out(arrays, codes=True)
        notes = [*source.notes, *parts.notes]
        codes = {part.name: _codes(part) for part in (*parts.train, *parts.test, *parts.unlabeled)}
        sizes = {array.shape[1:] for array in codes.values()}
        if len(sizes) > 1:
            raise ValueError(f"codes of several sizes: {some(f'{each} {list(codes[each].shape)}' for each in codes)}")
        train, test, unlabeled = (
            (
                _joined([codes[part.name] for part in some_parts]),
                [label for part in some_parts for label in part.labels],
            )
            for some_parts in (parts.train, parts.test, parts.unlabeled)
        )
        if train[0] is not None and test[0] is None:
            chosen = np.zeros(len(train[0]), bool)
            names = [f"{part.name}[{row}]" for part in parts.train for row in range(len(codes[part.name]))]
            chosen[[*held_out(train[1], names)]] = True
            test = train[0][chosen], [train[1][i] for i in np.flatnonzero(chosen)]
            train = train[0][~chosen], [train[1][i] for i in np.flatnonzero(~chosen)]
        found = class_indices(train[1], test[1], classes, notes=notes)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    tell(place, notes)
    # Neutral statistics, because codes are not normalised.
    channels = next(iter(codes.values())).shape[1]
    nothing = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "gray_mean": 0.0, "gray_std": 1.0}
    return dataset_of(name, _known(train[0]), test[0], found, unlabeled=unlabeled[0], statistics=nothing)


def _joined(arrays: list[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0] if arrays else None


def _codes(part: _Part) -> np.ndarray:
    """Return codes [N, C, H, W], as a view if they are uint8, else as int32."""
    array = np.asarray(part.images)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{part.name}: codes are integers, found {array.dtype}")
    if not array.size:
        raise ValueError(f"{part.name}: holds no codes")
    if array.min() < 0 or array.max() >= 2**31:
        raise ValueError(f"{part.name}: codes count from 0, found {array.min()} to {array.max()}")
    axis = channel_axis(array.shape[1:])
    view = array[:, None] if axis is None else np.moveaxis(array, axis, 1)
    return view if view.dtype == np.uint8 else view.astype(np.int32)


def _known(view: np.ndarray | None) -> np.ndarray:
    assert view is not None
    return view


def _sorted_out(arrays: Mapping[str, Any], *, codes: bool = False) -> tuple[Parts[_Part], Sequence[str]]:
    """Sort arrays into the parts of a data set, and return these with the class names, if an array has them.

    codes: the arrays hold codes, so that a map of width 3 or 4 is not taken for channels.
    """
    images: dict[Part, list[str]] = {}
    labels: dict[Part, list[str]] = {}
    classes: Sequence[str] = ()
    passed_over: list[str] = []
    unnamed: list[str] = []
    for name, role in _roles(arrays).items():
        if role == "classes":
            classes = [str(plain_label(value)) for value in np.asarray(arrays[name][...]).reshape(-1)]
        elif role in ("images", "labels"):
            (images if role == "images" else labels).setdefault(split_in(name) or "train", []).append(name)
        else:
            (unnamed if role == "unnamed" else passed_over).append(name)
    named: list[tuple[str, _Part]] = []
    no_classes: list[str] = []
    for part, names in images.items():
        theirs = _paired(names, labels.pop(part, []), part)
        for name in names:
            _check_images(name, arrays[name], codes)
            known: list[Label] = [None] * len(arrays[name])
            if theirs:
                known = _labels(theirs[name], arrays[theirs[name]], no_classes)
            if len(known) != len(arrays[name]):
                raise ValueError(f"{name} holds {len(arrays[name])} images, {theirs[name]} {len(known)} labels")
            named.append((name, _Part(name, arrays[name], known)))
    if not codes and len(named) > 2 and all(arrays[name].ndim == 3 and len(arrays[name]) == 3 for name, _ in named):
        # Two such arrays may be a training and a test part.
        raise ValueError(
            f"{some(name for name, _ in named)}: each of shape [3, H, W], which is that of one image: "
            "give all images as one array [N, C, H, W]"
        )
    if not named:
        raise ValueError(f"expected an array of images [N, H, W] or [N, H, W, C], found {_described(arrays)}")
    parts = parts_of(named, lambda several: any(label is not None for part in several for label in part.labels))
    for several in (parts.train, parts.unlabeled):
        if len(several) > 1:
            parts.notes.append(f"trained on as one: {some(part.name for part in several)}")
    passed_over += [name for names in labels.values() for name in names]
    if passed_over:
        parts.notes.append(f"passed over arrays that are no images: {some(passed_over)}")
    if unnamed:
        parts.notes.append(f"passed over arrays that are not called images as others are: {some(unnamed)}")
    if no_classes:
        parts.notes.append(f"passed over labels that are not one number or name an image: {some(no_classes)}")
    return parts, classes


def _paired(images: list[str], labels: list[str], part: Part) -> dict[str, str]:
    """Return, for the arrays of images of one part, the arrays of labels that belong to them; {} without labels.

    If there are several, names that differ only in words such as "x" and "y" belong together. Raises ValueError unless
    each array of images has one array of labels.
    """
    if len(labels) not in (0, len(images)):
        raise ValueError(f"expected one array of labels for {some(images)}, found {some(labels)}")
    if len(labels) < 2:
        return dict(zip(images, labels, strict=False))
    by_key = {_key(name, part): name for name in labels}
    paired = {name: by_key[_key(name, part)] for name in images if _key(name, part) in by_key}
    if len({*paired.values()}) < len(images):
        raise ValueError(
            f"the names do not tell which labels {some(images)} have, of {some(labels)}: expected names that differ "
            "only in words such as x and y"
        )
    return paired


def _key(name: str, part: Part) -> tuple[str, ...]:
    """Return the words that the names of an array of images and of its labels share."""
    words = words_and_numbers(name)
    return tuple(word for word in words if word not in _IMAGES | _LABELS and split_in(word) != part)


def _check_images(name: str, array: Any, codes: bool) -> None:
    """Raise ValueError if an array's shape is not that of images. Arrays of objects (encoded images) may have any."""
    try:
        if array.dtype.kind != "O":
            channel_axis(array.shape[1:])
            if not codes:
                check_several(array.shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _roles(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Return the role of each array: "images", "labels", "classes", "" for none of these, or "unnamed".

    An "unnamed" array could hold images, but others are named more clearly: by their own name where it has only its
    folder's, as "data/masks" next to "data/images", or by any name where it has none.
    """
    found = {name: _role(name, array) for name, array in arrays.items()}
    named = [name for name, (role, by) in found.items() if role == "images" and by != "shape"]
    folders = {_folder(name) for name in named if found[name].by == "name"}
    roles: dict[str, str] = {name: role for name, (role, _) in found.items()}
    for name, (role, by) in found.items():
        if role == "images" and ((by == "shape" and named) or (by == "folder" and _folder(name) in folders)):
            roles[name] = "unnamed"
    return roles


class _Role(NamedTuple):
    """The role of an array, and the property that it was inferred from."""

    role: Literal["images", "labels", "classes", ""]
    by: Literal["name", "folder", "shape"]


def _role(name: str, array: Any) -> _Role:
    """Infer an array's role from its name, else from its folders' or groups' names, else from its shape."""
    by: Literal["name", "folder"]
    for by, words in (("name", in_words(name.rpartition("/")[2])), ("folder", in_words(name))):
        # A table does not hold class names; an example is dSprites' latents_classes.
        in_one_row = array.size == max(array.shape, default=1)
        if in_one_row and ("classes" in words or ("names" in words and _LABELS & {*words})):
            return _Role("classes", by)
        for word in reversed(words):
            if word in _LABELS:
                return _Role("labels", by)
            if word in _IMAGES and (array.ndim > 1 or array.dtype.kind == "O"):
                return _Role("images", by)
    return _Role("images" if array.ndim in (3, 4) else "", "shape")


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _labels(name: str, array: Any, no_classes: list[str]) -> list[Label]:
    """Return the labels in an array. If each image has several values, all are None, and no_classes gets the name."""
    if array.ndim == 0:
        raise ValueError(f"{name}: expected labels [N], got shape []")
    if array.size != len(array):
        no_classes.append(f"{name} {list(array.shape)}")
        return [None] * len(array)
    values = np.asarray(array[...]).reshape(-1)  # MedMNIST's labels are [N, 1], PatchCamelyon's [N, 1, 1, 1].
    if values.dtype.kind == "f" and np.isnan(values).any():
        row = int(np.isnan(values).argmax())
        raise ValueError(f"{name}: label {row} is NaN: a label that is missing is -1")
    if values.dtype.kind == "f" and np.array_equal(values, np.rint(values)):
        values = values.astype(np.int64)
    try:
        return [plain_label(value) for value in values.tolist()]
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _view(images: Any, image_size: int | None) -> np.ndarray | None:
    """Return images as uint8 [N, C, H, W] without a copy, or None if they need conversion."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or not len(images):
        return None
    axis = channel_axis(images.shape[1:])
    view = images[:, None] if axis is None else np.moveaxis(images, axis, 1)
    height, width = view.shape[2:]
    fits = min(height, width) <= KEPT_SIZE if image_size is None else height == width == image_size
    return view if fits else None


def _samples(place: Path, parts: list[_Part]) -> Iterator[Sample]:
    for part in parts:
        numbers = part.images.dtype.kind in "iuf" and part.images.dtype != np.uint8
        if numbers:
            _check_range(place, part)
        for start, block in _blocks(place, part):
            # Integers are converted here, by the range of the whole array, since a dark 16-bit image may look like one
            # of 8 bits. Floating point is converted later, image by image, to leave out only those not finite.
            levels = to_levels(block) if numbers and block.dtype.kind != "f" else block
            for number, image in enumerate(levels, start):
                yield Sample(image, part.labels[number], f"{part.name}[{number}]")


def _check_range(place: Path, part: _Part) -> None:
    """Raise ValueError if the values of a whole array are not those of images. (A single dark image may mislead.)"""
    low: Any = np.inf
    high: Any = -np.inf
    for _, block in _blocks(place, part):
        finite = block[np.isfinite(block)]
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
    if low <= high:
        try:
            check_range(part.images.dtype, low, high)
        except ValueError as error:
            raise ValueError(f"{place}: {part.name}: {error}") from None


def _blocks(place: Path, part: _Part) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the images in blocks, each with the index of its first image."""
    for start in range(0, len(part.images), _BLOCK):
        try:
            yield start, part.images[start : start + _BLOCK]
        except OSError as error:  # Such as a damaged chunk of HDF5.
            raise ValueError(f"{place}: {part.name} cannot be read from row {start} on: {error}") from None


def _described(arrays: Mapping[str, Any]) -> str:
    return some(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()) or "none"
