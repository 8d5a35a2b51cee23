"""What Hugging Face's ``datasets`` keeps on disk: Arrow, which save_to_disk writes, and Parquet, which its hub has.

Source: https://huggingface.co/docs/datasets. A column of images is a struct of bytes and path; what the columns are,
and the names of classes, stands in the schema of every file. Files are read with pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from cpc_ext.data.decoded_cache import require_lasting
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.labels import NO_LABEL, Label
from cpc_ext.data.images.samples import Sample, Source, load_source
from cpc_ext.data.images.source_files import SourceFiles, parts_of, source_files
from cpc_ext.data.libraries import optional

_WHAT = ("Arrow or Parquet file", "Arrow or Parquet files")
_SUFFIXES = (".arrow", ".parquet")
# Beside the files of a data set: which of them it consists of.
_STATE = "state.json"
# What ends a stream of Arrow's.
_END = b"\xff\xff\xff\xff\0\0\0\0"
# What a file of Arrow's begins with that is no stream.
_FILE_MARK = b"ARROW1"
_IMAGES = ("image", "img")
_LABEL_TYPES = ("int", "uint", "bool", "string", "large_string")
_LABELS = ("label", "labels", "fine_label", "class", "cls")
# Rows of Parquet that are read at a time.
_ROWS = 64


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open what ``save_to_disk`` has written, or Arrow or Parquet files below a folder: decoded once into the cache.

    Words in the names of files and folders are the splits (train/data-00000-of-00001.arrow, test-00000.parquet);
    without, a tenth of each class is held out. The images are the first column of images, the labels the first of
    class labels, or those that are called so.

    image_size: as :func:`cpc_ext.data.images.folders.folder.load` takes it.

    Raises FileNotFoundError or PermissionError for the files, ValueError where one is damaged or holds no images,
    ImportError without pyarrow, OSError where the cache cannot be written.
    """
    pyarrow = _library("pyarrow")
    found = source_files(data_dir, _WHAT, _SUFFIXES, f"pyarrow {pyarrow.__version__}")
    source = SourceFiles(found.root, _current(found.root, found.files), found.notes)
    parts = parts_of((file.path, file) for file in source.files)
    samples = partial(_samples, source.root)
    first = source.root / (parts.train or parts.test)[0].path
    return load_source(
        Source(
            name="huggingface",
            root=source.root,
            files=source.files,
            train=partial(samples, parts.train),
            test=partial(samples, parts.test) if parts.test else None,
            unlabeled=partial(samples, parts.unlabeled) if parts.unlabeled else None,
            classes=lambda: _columns(_schema(first), first).classes,
            reader=("Pillow", PIL.__version__),
            notes=[*source.notes, *parts.notes],
        ),
        image_size,
    )


def _library(name: str) -> Any:
    return optional(name, "huggingface", "Arrow and Parquet files")


def _current(root: Path, files: Iterable[TreeFile]) -> list[TreeFile]:
    """The files without those that a folder's state does not name: shards of before, and kept results of map."""
    named: dict[Path, set[str] | None] = {}
    for file in files:
        folder = (root / file.path).parent
        if folder not in named:
            named[folder] = _named_in(folder / _STATE)
    kept = []
    for file in files:
        path = root / file.path
        current = named[path.parent]
        if path.name in current if current is not None else not path.name.startswith("cache-"):
            kept.append(file)
    missing = sorted(
        str(folder / name) for folder, names in named.items() for name in names or () if not (folder / name).is_file()
    )
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing, which {_STATE} beside it names")
    if not kept:
        raise ValueError(f"{root}: holds no file of a data set, only results of computations")
    return kept


def _named_in(path: Path) -> set[str] | None:
    """The files that a state names; None where there is no state. ValueError where it is damaged."""
    try:
        return {entry["filename"] for entry in json.loads(path.read_text("utf-8"))["_data_files"]}
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


class _Columns(NamedTuple):
    """The names of the columns of images and of labels, if there are any, and of the classes, if they are known."""

    image: str
    label: str | None
    classes: Sequence[str]


def _samples(root: Path, files: Iterable[TreeFile]) -> Iterator[Sample]:
    for file in files:
        yield from samples_of(root / file.path, file.path)


def samples_of(path: Path, name: str) -> Iterator[Sample]:
    """The rows of a file, which is called so. ValueError where it is damaged, or none of its columns is of images."""
    columns = _columns(_schema(path), path)
    number = 0
    for batch in _batches(path, columns):
        images = batch.column(columns.image).to_pylist()
        labels: list[Label] = [None] * len(images)
        if columns.label is not None:
            labels = batch.column(columns.label).to_pylist()
        for image, label in zip(images, labels, strict=True):
            yield Sample(_content(image, path), None if label == NO_LABEL else label, f"{name}[{number}]")
            number += 1


def _content(image: Any, path: Path) -> object:
    """The bytes of an image; where they are in a file beside, of that; None where they are nowhere."""
    if not isinstance(image, dict):
        return image
    if image.get("bytes") is None and image.get("path"):
        beside = path.parent / image["path"]
        try:
            return beside.read_bytes()
        except OSError as error:
            require_lasting(beside, error)
            return None
    return image.get("bytes")


def _columns(schema: Any, path: Path) -> _Columns:
    """What the columns of a file are. ValueError where none is of images."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        features = {}
    kinds = {name: about.get("_type") for name, about in features.items() if isinstance(about, dict)}

    def column(kind: str, names: Sequence[str]) -> str | None:
        known = [name for name in schema.names if kinds.get(name) == kind]
        called = [name for name in names if name in schema.names]
        return next(iter((*known, *called)), None)

    image, label = column("Image", _IMAGES), column("ClassLabel", _LABELS)
    if image is None:
        raise ValueError(f"{path}: expected a column of images, found {', '.join(map(str, schema))}")
    kind = str(schema.field(image).type)
    if not kind.startswith(("struct<", "binary", "large_binary")):
        raise ValueError(f"{path}: expected images as the content of files in column {image}, found {kind}")
    if label is not None and not str(schema.field(label).type).startswith(_LABEL_TYPES):
        label = None
    names = features.get(label, {}).get("names", ()) if isinstance(features.get(label), dict) else ()
    return _Columns(image, label, names)


def _schema(path: Path) -> Any:
    with _opened(path) as file:
        return getattr(file, "schema_arrow", None) or file.schema


def _batches(path: Path, columns: _Columns) -> Iterator[Any]:
    """The rows of a file, some at a time. ValueError where they cannot be read."""
    wanted = [name for name in (columns.image, columns.label) if name is not None]
    with _opened(path) as file:
        try:
            if path.suffix.lower() == ".parquet":
                yield from file.iter_batches(_ROWS, columns=wanted)
            elif hasattr(file, "num_record_batches"):
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                yield from file
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A reader of pyarrow's for a file. ValueError where it is damaged or cut off."""
    arrow, ipc, parquet = (_library(name) for name in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"))
    with ExitStack() as stack:
        try:
            if path.suffix.lower() == ".parquet":
                reader = stack.enter_context(parquet.ParquetFile(path))
            else:
                with path.open("rb") as file:
                    stream = file.read(len(_FILE_MARK)) != _FILE_MARK
                    file.seek(-min(len(_END), file.seek(0, 2)), 2)
                    # The reader would take the end of the file for that of the stream.
                    if stream and file.read() != _END:
                        raise ValueError("it has no end")
                content = stack.enter_context(arrow.memory_map(str(path)))
                reader = stack.enter_context(ipc.open_stream(content) if stream else ipc.open_file(content))
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged or cut off: {error}") from None
        yield reader
