"""WebDataset's shards: tar archives in which consecutive files with the same name up to the first dot are a sample.

Source: https://github.com/webdataset/webdataset. The suffixes say what files hold: an image, its class ("cls"), or more
about it ("json"). Shards are read with Python's tarfile.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL

from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.decode import image_suffixes
from cpc_ext.data.images.labels import Label, label_in, plain_label
from cpc_ext.data.images.samples import Sample, Source, labelled_parts, load_source
from cpc_ext.data.images.source_files import SHARD_SUFFIXES, source_files

_WHAT = ("shard", "shards")
_PIECE = 1 << 20
# Keys of the class in a sample's "json".
_LABEL_KEYS = ("label", "cls", "class")


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open a shard, or all shards below a folder; decodes once into the cache.

    Words in the names of shards and folders are the splits (imagenet-train-0001.tar, val/00.tar); without them, a tenth
    of each class is held out. A sample's label is its "cls", an integer or a name, else "label", "cls" or "class" in
    its "json". Samples without an image are left out. Of several images in a sample, one with a suffix of a single part
    is taken ("png" before "depth.png"), else the first, with a warning; the same holds for several "cls" or "json".

    image_size: see :func:`cpc_ext.data.images.folders.folder.load`.

    Raises FileNotFoundError or PermissionError for the files, ValueError if a shard is damaged or cut off, or none
    holds an image to train on, OSError if the cache cannot be written.
    """
    source = source_files(data_dir, _WHAT, SHARD_SUFFIXES, "tarfile")
    samples = partial(_samples, source.root)
    parts = labelled_parts(source.files, samples)
    return load_source(
        Source(
            name="webdataset",
            root=source.root,
            files=source.files,
            train=partial(samples, parts.train),
            test=partial(samples, parts.test) if parts.test else None,
            unlabeled=partial(samples, parts.unlabeled) if parts.unlabeled else None,
            reader=("Pillow", PIL.__version__),
            notes=[*source.notes, *parts.notes],
        ),
        image_size,
    )


def _samples(root: Path, shards: Iterable[TreeFile]) -> Iterator[Sample]:
    kinds = {suffix.removeprefix(".") for suffix in image_suffixes()}
    for shard in shards:
        path = root / shard.path
        for key, members in groupby(_members(path), key=lambda member: _key(member[0])):
            fields: dict[str, bytes] = {}
            for member, content in members:
                if member in fields:
                    raise ValueError(f"{path}: holds {member} twice in one sample")
                fields[member] = content
            images = _of_kinds(fields, kinds)
            label, remark = _label(path, key, fields)
            if len(images) > 1:
                remark = "took the first of several images"
            yield Sample(next(iter(images), None), label, f"{shard.path}/{key}", remark)


def _of_kinds(fields: dict[str, bytes], kinds: Collection[str]) -> list[bytes]:
    """Return the contents of a sample's files of some kinds, preferring suffixes of a single part.

    The last part of a suffix says what a file holds: "input.png" and "output.cls" are an image and a class.
    """
    found = {name: content for name, content in fields.items() if name.rpartition(".")[2].lower() in kinds}
    plain = [content for name, content in found.items() if name.rpartition("/")[2].count(".") == 1]
    return plain or [*found.values()]


def _key(name: str) -> str:
    """Return the part of a name that the files of a sample share."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of a shard's files. Raises ValueError if it is damaged or cut off."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                linked = member.islnk() or member.issym()
                content = archive.extractfile(member) if member.isreg() or linked else None
                # In WebDataset, names that begin with two underscores describe the shard itself.
                if content is not None and not member.name.startswith("__"):
                    yield member.name.removeprefix("./"), content.read()
            # tarfile takes the first header that it cannot read for the end.
            file: Any = archive.fileobj
            file.seek(archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if end != b"\0" * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"byte {archive.offset} is neither a file's header nor the archive's end")
            while piece := file.read(_PIECE):  # To the end, so that a compressed archive's checksum is verified.
                if piece.strip(b"\0"):
                    raise tarfile.ReadError("more follows the archive's end, such as another archive")
    except FileNotFoundError:
        raise
    # Links to missing files raise KeyError, links to each other RecursionError.
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or cut off: {error}") from None


def _label(path: Path, key: str, fields: dict[str, bytes]) -> tuple[Label, str]:
    """Return a sample's label, if any, and a remark on it. Raises ValueError if its "json" is not valid JSON."""
    for content in _of_kinds(fields, ("cls",)):
        text = content.decode("utf-8", errors="replace").strip()
        return plain_label(int(text)) if text.removeprefix("-").isdecimal() else text, ""
    texts = _of_kinds(fields, ("json",))
    if not texts:
        return None, ""
    try:
        about = json.loads(texts[0])
    except ValueError as error:
        raise ValueError(f"{path}: {key}.json: {error}") from None
    found = next((about[name] for name in _LABEL_KEYS if name in about), None) if isinstance(about, dict) else None
    return label_in(found)
