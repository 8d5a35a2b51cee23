"""Files of Hugging Face's ``datasets``: Arrow, which save_to_disk writes, and Parquet, which its Hub has.

Source: https://huggingface.co/docs/datasets. A column of images is a struct of bytes and path. The schema of every file
states the columns' types and the names of classes. Files are read with pyarrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from cpc_ext.data.decoded_cache import require_lasting
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.images.columns import of_type
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.labels import label_in
from cpc_ext.data.images.samples import Sample, Source, labelled_parts, load_source
from cpc_ext.data.images.source_files import SourceFiles, source_files
from cpc_ext.data.libraries import optional

_WHAT = ("Arrow or Parquet file", "Arrow or Parquet files")
_SUFFIXES = (".arrow", ".parquet")
# A file in the folder of a data set that names the files it consists of.
_STATE = "state.json"
# The bytes that end an Arrow stream.
_END = b"\xff\xff\xff\xff\0\0\0\0"
# The first bytes of an Arrow file, as opposed to an Arrow stream.
_FILE_MARK = b"ARROW1"
_IMAGES = ("image", "img")
_LABEL_TYPES = ("int", "uint", "bool", "string", "large_string", "halffloat", "float", "double", "null")
_LABELS = ("label", "labels", "fine_label", "class", "cls")
# Rows of Parquet read at a time.
_ROWS = 64


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open the output of ``save_to_disk``, or Arrow or Parquet files below a folder; decodes once into the cache.

    Words in the names of files and folders are the splits (train/data-00000-of-00001.arrow, test-00000.parquet);
    without them, a tenth of each class is held out. The schema's types determine the columns of images and of class
    labels. Of several such columns, the one with a usual name is taken, else the first, with a warning; without types,
    columns with the usual names.

    image_size: see :func:`cpc_ext.data.images.folders.folder.load`.

    Raises FileNotFoundError or PermissionError for the files, ValueError if one is damaged or holds no images,
    ImportError without pyarrow, OSError if the cache cannot be written.
    """
    pyarrow = _library("pyarrow")
    found = source_files(data_dir, _WHAT, _SUFFIXES, f"pyarrow {pyarrow.__version__}")
    source = SourceFiles(found.root, _current(found.root, found.files), found.notes)
    samples = partial(_samples, source.root)
    parts = labelled_parts(source.files, samples)
    first = source.root / parts.train[0].path
    columns = _columns(_schema(first), first)
    return load_source(
        Source(
            name="huggingface",
            root=source.root,
            files=source.files,
            train=partial(samples, parts.train),
            test=partial(samples, parts.test) if parts.test else None,
            unlabeled=partial(samples, parts.unlabeled) if parts.unlabeled else None,
            classes=lambda: columns.classes,
            reader=("Pillow", PIL.__version__),
            notes=[*source.notes, *parts.notes, *columns.notes],
            state=[columns.image, columns.label, *_state_beside(source.root, source.files)],
        ),
        image_size,
    )


def _library(name: str) -> Any:
    return optional(name, "huggingface", "Arrow and Parquet files")


def _current(root: Path, files: Iterable[TreeFile]) -> list[TreeFile]:
    """Return the files that their folder's state names, which excludes earlier shards and cached results of map."""
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
    """Return the files that a state file names, or None if there is no such file. Raises ValueError if damaged."""
    try:
        return {entry["filename"] for entry in json.loads(path.read_text("utf-8"))["_data_files"]}
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


class _Columns(NamedTuple):
    """The names of the columns of images and of labels, if any, and of the classes, if known.

    notes: remarks on columns that are not used.
    """

    image: str
    label: str | None
    classes: Sequence[str]
    notes: Sequence[str]


def _samples(root: Path, files: Iterable[TreeFile]) -> Iterator[Sample]:
    for file in files:
        yield from samples_of(root / file.path, file.path)


def samples_of(path: Path, name: str) -> Iterator[Sample]:
    """Yield the rows of a file. Raises ValueError if it is damaged or has no column of images.

    name: name of the file in the samples' names.
    """
    columns = _columns(_schema(path), path)
    number = 0
    for batch in _batches(path, columns):
        images = batch.column(columns.image).to_pylist()
        values = [None] * len(images) if columns.label is None else batch.column(columns.label).to_pylist()
        for image, value in zip(images, values, strict=True):
            label, remark = label_in(value)
            yield Sample(_content(image, path), label, f"{name}[{number}]", remark)
            number += 1


def _content(image: Any, path: Path) -> object:
    """Return the bytes of an image, from the file next to path that it names if it has none, or None without either."""
    if not isinstance(image, dict):
        return image
    if image.get("bytes") is None and image.get("path"):
        beside = path.parent / image["path"]  # _state_beside detects changes of this file.
        try:
            return beside.read_bytes()
        except OSError as error:
            require_lasting(beside, error)
            return None
    return image.get("bytes")


def _state_beside(root: Path, files: Iterable[TreeFile]) -> list[str]:
    """Return a digest of sizes, times and inodes of the image files that the data set only names; [] without any."""
    told: list[tuple[str, tuple[int, ...] | None]] = []
    for file in files:
        path = root / file.path
        for name in _named_beside(path, _columns(_schema(path), path).image):
            try:
                status = (path.parent / name).stat()
            except OSError:
                told.append((name, None))
            else:
                told.append((name, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)))
    return [hashlib.sha256(json.dumps(told).encode()).hexdigest()] if told else []


def _named_beside(path: Path, image: str) -> Iterator[str]:
    """Yield the names of files that hold a column's images.

    The bytes are not read. If only some rows of a Parquet row group or an Arrow batch have bytes, those of the others
    are not told apart, so that the names of all its rows are yielded; if all have bytes, none is.
    """
    with _opened(path) as file:
        try:
            if path.suffix.lower() == ".parquet":
                for group in range(file.num_row_groups):
                    about = file.metadata.row_group(group)
                    leaves = {leaf.path_in_schema: leaf for leaf in map(about.column, range(about.num_columns))}
                    content = leaves.get(f"{image}.bytes")
                    known = content.statistics if content is not None else None
                    if f"{image}.path" in leaves and not (known and known.has_null_count and not known.null_count):
                        column = file.read_row_group(group, columns=[f"{image}.path"]).column(image)
                        yield from (row["path"] for row in column.to_pylist() if row and row["path"])
                return
            for batch in _arrow_batches(file):
                column = batch.column(image)
                fields = {field.name for field in column.type} if str(column.type).startswith("struct<") else set()
                if "path" in fields and not ("bytes" in fields and not column.field("bytes").null_count):
                    yield from (name for name in column.field("path").to_pylist() if name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged: {error}") from None


def _columns(schema: Any, path: Path) -> _Columns:
    """Determine the columns of images and labels of a file. Raises ValueError if none holds images."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        features = {}
    types = {name: str(about.get("_type")) for name, about in features.items() if isinstance(about, dict)}

    kinds = {name: types[name] for name in schema.names if name in types}
    notes: list[str] = []

    def column(kind: str, names: Sequence[str]) -> str | None:
        return of_type(kind, kinds, names, notes) or next((name for name in names if name in schema.names), None)

    image, label = column("Image", _IMAGES), column("ClassLabel", _LABELS)
    if image is None:
        raise ValueError(f"{path}: expected a column of images, found {', '.join(map(str, schema))}")
    kind = str(schema.field(image).type)
    if not kind.startswith(("struct<", "binary", "large_binary")):
        raise ValueError(f"{path}: expected images as the content of files in column {image}, found {kind}")
    if label is not None:
        kind = str(schema.field(label).type)
        if not kind.removeprefix("dictionary<values=").startswith(_LABEL_TYPES):
            notes.append(f"column {label} holds {kind}, of which there are no classes, so the images have no labels")
            label = None
    names = features.get(label, {}).get("names", ()) if isinstance(features.get(label), dict) else ()
    return _Columns(image, label, names, notes)


def _schema(path: Path) -> Any:
    with _opened(path) as file:
        return getattr(file, "schema_arrow", None) or file.schema


def _batches(path: Path, columns: _Columns) -> Iterator[Any]:
    """Yield the rows of a file in batches. Raises ValueError if they cannot be read."""
    wanted = [name for name in (columns.image, columns.label) if name is not None]
    with _opened(path) as file:
        try:
            if path.suffix.lower() == ".parquet":
                yield from file.iter_batches(_ROWS, columns=wanted)
            else:
                yield from _arrow_batches(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged: {error}") from None


def _arrow_batches(file: Any) -> Iterator[Any]:
    """Yield the rows of an Arrow stream or file in batches."""
    if hasattr(file, "num_record_batches"):
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        yield from file


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file with pyarrow's reader. Raises ValueError if it is damaged or cut off."""
    arrow, ipc, parquet = (_library(name) for name in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"))
    with ExitStack() as stack:
        try:
            if path.suffix.lower() == ".parquet":
                reader = stack.enter_context(parquet.ParquetFile(path))
            else:
                with path.open("rb") as file:
                    stream = file.read(len(_FILE_MARK)) != _FILE_MARK
                    file.seek(-min(len(_END), file.seek(0, 2)), 2)
                    # The reader takes the end of a truncated file for the end of the stream.
                    if stream and file.read() != _END:
                        raise ValueError("it has no end")
                content = stack.enter_context(arrow.memory_map(str(path)))
                reader = stack.enter_context(ipc.open_stream(content) if stream else ipc.open_file(content))
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged or cut off: {error}") from None
        yield reader
