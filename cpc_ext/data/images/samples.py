"""Data sets of samples that a source yields, cached as rows of one memory-mapped file.

See :mod:`cpc_ext.data.decoded_cache`. A source reads files of one format and yields the samples to train on and those
to test on. Without samples to test on, a tenth of each class is held out, as for a folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.decoded_cache import DecodedCache
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.decode import AHEAD, RowWriter, SizeNotKept, reason_of
from cpc_ext.data.images.decode_cache import DEFAULT_SIZE
from cpc_ext.data.images.labels import Classes, Label, class_indices
from cpc_ext.data.images.pixels import to_pixels
from cpc_ext.data.images.source_files import Parts, parts_of, place_of
from cpc_ext.data.images.statistics import PixelStatistics, pixel_statistics
from cpc_ext.data.notice import LeftOut, tell
from cpc_ext.data.splits import held_out
from cpc_ext.data.threads import in_order

__all__ = ["Rows", "Sample", "Source", "dataset_of", "labelled_parts", "load_source", "move_to_end", "write_samples"]

# Part of a cache's key: raise it when what is written changes.
_FORMAT = 4
# Samples that are read to find out whether a part of a data set has labels.
_LOOKED_AT = 64


class Sample(NamedTuple):
    """One sample of a source.

    image: an argument of :func:`to_pixels`, or None. label: its class. name: its name in messages.
    remark: a remark on it for the user.
    """

    image: object
    label: Label = None
    name: str = ""
    remark: str = ""


@dataclass
class Rows:
    """The samples that were written.

    shape: [C, H, W] of every image. reasons: pairs of a left-out sample's name and the reason. remarks: pairs of a
        sample's name and a remark.
    """

    shape: tuple[int, ...] = ()
    labels: list[Label] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    reasons: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)


class Source(NamedTuple):
    """A data set in files of some format.

    name: name of the data set. root: the folder of the files. files: the files whose changes invalidate the cache.
    train, test, unlabeled: functions that return the samples. Without test, a part of the training samples is held out.
        With unlabeled, models train on these, and the training samples are for probes.
    classes: function that returns the class names, () if the labels themselves are the names.
    reader: the library that reads the files, and its version.
    notes: remarks on the files for the user.
    state: other values that change with the data set, as JSON values.
    """

    name: str
    root: Path
    files: Sequence[TreeFile]
    train: Callable[[], Iterable[Sample]]
    reader: tuple[str, str]
    notes: list[str]
    test: Callable[[], Iterable[Sample]] | None = None
    unlabeled: Callable[[], Iterable[Sample]] | None = None
    classes: Callable[[], Sequence[str]] = tuple
    state: Sequence[object] = ()


def labelled_parts(files: Sequence[TreeFile], samples: Callable[[list[TreeFile]], Iterable[Sample]]) -> Parts[TreeFile]:
    """Divide files into the parts of a data set by their names: test before validation, unless only that has labels.

    samples: function that returns the samples in some of the files.
    """

    def labelled(part: list[TreeFile]) -> bool:
        return any(sample.label is not None for sample in islice(samples(part), _LOOKED_AT))

    return parts_of(((file.path, file) for file in files), labelled)


def load_source(source: Source, image_size: int | None) -> Dataset:
    """Load the data set of a source, decoded once into the user's cache; a warning says what was left out.

    image_size: see the loader of a folder.

    Raises ValueError if no sample can be read or labels do not fit, OSError if the cache cannot be written, and what
    reading raises.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    cache = DecodedCache(
        root=source.root,
        files=source.files,
        what="images",
        form=[_FORMAT, *source.state],
        reader=source.reader,
        variant=[source.name, image_size, source.files[0].path],
    )

    def build(target: Path, _: list[Path]) -> tuple[dict[str, Any], dict[int, str]]:
        try:
            return _build(source, target, image_size), {}
        except SizeNotKept:
            return _build(source, target, DEFAULT_SIZE), {}

    kept = cache.kept(build)
    place = place_of(source.root, source.files)
    content = kept.index
    left_out = LeftOut("samples")
    for name, reason in content["reasons"]:
        left_out.add(name, reason)
    notes = [*source.notes, *content["notes"]]
    labels, (first, end) = content["labels"], content["train"]
    try:
        classes = class_indices(labels[first:end], labels[end:], content["classes"], notes=notes)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    tell(place, [*notes, *left_out.lines()])
    images = np.memmap(kept.file, dtype=np.uint8, mode="r", shape=(len(labels), *content["shape"]))
    return dataset_of(
        source.name,
        images[first:end],
        images[end:],
        classes,
        unlabeled=images[:first] if first else None,
        names=content["names"][first:],
        statistics=content["statistics"],
    )


def dataset_of(
    name: str,
    train: np.ndarray,
    test: np.ndarray | None,
    classes: Classes,
    *,
    unlabeled: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    statistics: dict[str, Any] | None = None,
) -> Dataset:
    """Make a Dataset of images, uint8 [N, C, H, W].

    test: images to test on; None or empty if there are none. unlabeled: images to train on in place of the training
    images, which are then for probes. names: names of the training images and then of the test images.
    statistics: statistics of the pixels, if they are known.
    """
    test = test if test is not None and len(test) else None
    called = None if names is None else (names[: len(train)], names[len(train) :])
    training = ImageSet(train, classes.train, called and called[0])
    pretrain = training if unlabeled is None else ImageSet(unlabeled)
    moments = pixel_statistics(pretrain.images) if statistics is None else PixelStatistics.of(statistics)
    return Dataset(
        name=name,
        pretrain=pretrain,
        train=training if classes.names else None,
        test=None if test is None else ImageSet(test, classes.test, called and called[1]),
        classes=classes.names,
        **asdict(moments),
    )


def write_samples(samples: Iterable[Sample], image_size: int | None, rows: Rows, writer: RowWriter) -> None:
    """Decode samples in threads, and append their images to a writer's file.

    rows: the samples written so far, to which these are added.

    Raises SizeNotKept as RowWriter does, and OSError.
    """

    def decode(sample: Sample) -> tuple[Sample, np.ndarray | str]:
        if sample.image is None:
            return sample, "holds no image"
        # A damaged image makes Pillow's readers raise nearly anything.
        try:
            return sample._replace(image=None), to_pixels(sample.image, image_size)
        except Exception as error:
            return sample._replace(image=None), reason_of(error)

    with closing(in_order(decode, samples, ahead=AHEAD, what=("image", "images"))) as decoded:
        for sample, pixels in decoded:
            reason = pixels if isinstance(pixels, str) else None
            if not isinstance(pixels, str):
                try:
                    writer.append(pixels)
                except ValueError as error:
                    reason = str(error)
            if reason is None:
                rows.labels.append(sample.label)
                rows.names.append(sample.name)
                if sample.remark:
                    rows.remarks.append((sample.name, sample.remark))
            else:
                rows.reasons.append((sample.name, reason))
    rows.shape = writer.shape


def move_to_end(images: np.ndarray, chosen: set[int]) -> list[int]:
    """Move chosen rows of an array to its end, each in exchange for a row there; the other rows stay in place.

    Returns the order: for each row, its index before.
    """
    order = list(range(len(images)))
    first = len(images) - len(chosen)
    vacated = sorted(index for index in chosen if index < first)
    staying = [index for index in range(first, len(images)) if index not in chosen]
    for low, high in zip(vacated, staying, strict=True):
        images[[low, high]] = images[[high, low]]
        order[low], order[high] = high, low
    return order


def _build(source: Source, target: Path, image_size: int | None) -> dict[str, Any]:
    rows = Rows()
    with target.open("wb") as out:
        writer = RowWriter(out, image_size)
        if source.unlabeled is not None:
            write_samples(source.unlabeled(), image_size, rows, writer)
        first = writer.count
        write_samples(source.train(), image_size, rows, writer)
        end = writer.count
        if source.test is not None:
            write_samples(source.test(), image_size, rows, writer)
        out.flush()
        os.fsync(out.fileno())
    if first == end:
        left_out = LeftOut("samples")
        for name, reason in rows.reasons:
            left_out.add(name, reason)
        place = place_of(source.root, source.files)
        raise ValueError("\n  ".join([f"{place}: no image to train on could be read", *left_out.lines()]))
    notes = [
        f"{remark} in {len(names)} samples: {some(names)}"
        for remark in dict.fromkeys(remark for _, remark in rows.remarks)
        if (names := [name for name, said in rows.remarks if said == remark])
    ]
    images = np.memmap(target, dtype=np.uint8, mode="r+", shape=(writer.count, *rows.shape))
    if source.test is None:
        chosen = held_out(rows.labels[first:], rows.names[first:])
        order = move_to_end(images[first:], chosen)
        images.flush()
        rows.labels[first:] = [rows.labels[first + i] for i in order]
        rows.names[first:] = [rows.names[first + i] for i in order]
        end -= len(chosen)
        if chosen:
            notes.append(
                f"no images to test on: {len(chosen)} of {len(order)}, about a tenth of each class, are held out"
            )
    return {
        "shape": list(rows.shape),
        "labels": rows.labels,
        "names": rows.names,
        "classes": list(source.classes()),
        "train": [first, end],
        "reasons": rows.reasons,
        "notes": notes,
        "statistics": asdict(pixel_statistics(images[: first or end])),
    }
