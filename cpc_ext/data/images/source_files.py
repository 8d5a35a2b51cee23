"""Search for the files of a data set that consists of a few large ones, and their division into training and test."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from cpc_ext._messages import some
from cpc_ext.data.file_tree import FileKind, TreeFile, read_tree, split_of

__all__ = [
    "HDF5_SUFFIXES",
    "SHARD_SUFFIXES",
    "Part",
    "Parts",
    "SourceFiles",
    "in_words",
    "parts_of",
    "place_of",
    "source_files",
    "split_in",
    "words_and_numbers",
]

Part = Literal["train", "validation", "test", "unlabeled"]
# Suffixes of HDF5 files and of shards. They are defined here because the modules that read such files import PyTorch,
# which takes too long when options are read, whose defaults depend on the size of images.
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
SHARD_SUFFIXES = (".tar", ".tgz", ".tar.gz")
# Words that may be joined to the name of a part without a separator, as in "xtrain" and "testlabels".
_ROLES = ("x", "y", "image", "images", "img", "imgs", "data", "label", "labels", "target", "targets")

T = TypeVar("T")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a data set.

    root: the folder of the files. files: the files, sorted by name. notes: remarks on ignored files.
    """

    root: Path
    files: list[TreeFile]
    notes: list[str]

    @property
    def place(self) -> Path:
        """Path of the files for messages."""
        return place_of(self.root, self.files)


def place_of(root: Path, files: Sequence[TreeFile]) -> Path:
    """Return the path of files for messages: the file if there is one, else the folder."""
    return root / files[0].path if len(files) == 1 else root


def source_files(data_dir: str | Path, what: tuple[str, str], suffixes: Iterable[str], reader: str) -> SourceFiles:
    """Find all files with one of these suffixes below a folder, or take a single file.

    what: noun for such a file in the singular and the plural. reader: the library that reads them.

    Raises FileNotFoundError or PermissionError for the folder, ValueError if it holds no such file.
    """
    path = Path(data_dir).expanduser()
    endings = sorted(suffixes)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; name the {what[0]}, or the folder, with --data-dir")
    if path.is_file():
        if not path.name.lower().endswith(tuple(endings)):
            raise ValueError(f"{path}: expected a file that ends in {' or '.join(endings)}, or a folder of such files")
        status = path.stat()
        file = TreeFile(path.name, "", status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return SourceFiles(path.parent, [file], [])
    # No media type, so that other files, such as text next to the data, are ignored without a remark.
    kind = FileKind(what, ", ".join(endings), frozenset(endings), frozenset(), "none", reader)
    tree = read_tree(path, kind, splits=False)
    return SourceFiles(path, sorted(tree.train, key=lambda file: file.path), [*tree.notes, *tree.left_out.lines()])


def in_words(name: str) -> list[str]:
    """Split a name into lower-case words: "X_train", "xtrain" → ["x", "train"], "testImages" → ["test", "images"]."""
    return [word for word in words_and_numbers(name) if word.isascii() and word.isalpha()]


def words_and_numbers(name: str) -> list[str]:
    """Split a name like :func:`in_words`, but keep words of other alphabets and numbers: "x09" → ["x", "9"]."""
    found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|[^\W\d_A-Za-z]+", name)
    return [part for word in found for part in _taken_apart(word.lower().lstrip("0") or "0")]


def _taken_apart(word: str) -> tuple[str, ...]:
    for role in _ROLES:
        before, after = word.removesuffix(role), word.removeprefix(role)
        if after != word and _part_of(after):
            return role, after
        # Two letters before a role do not name a part: "try" and "tex" are words of their own.
        if before != word and len(before) > 2 and _part_of(before):
            return before, role
    return (word,)


def split_in(name: str) -> Part | None:
    """Return the part of a data set that a file or an array belongs to, by its path, or None.

    The first word that names a part counts, in the file's own name, else in the innermost folder that has one.
    """
    return next(_parts_in(name), None)


def _parts_in(name: str) -> Iterator[Part]:
    """Yield the parts that words of a path name, in order of precedence."""
    for segment in reversed(name.split("/")):
        for word in in_words(segment):
            part = _part_of(word)
            if part is not None:
                yield part


def _part_of(word: str) -> Part | None:
    split = split_of(word)
    return None if split == "beside" else split


@dataclass
class Parts(Generic[T]):
    """The parts of a data set: to train on, to test on, and to train on without labels; with notes for the user."""

    train: list[T] = field(default_factory=list)
    test: list[T] = field(default_factory=list)
    unlabeled: list[T] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parts_of(named: Iterable[tuple[str, T]], labelled: Callable[[list[T]], bool] | None = None) -> Parts[T]:
    """Divide files or arrays into parts by their names; a name without a part's word is for training.

    Test takes precedence over validation, unless only the latter is `labelled`; the other one is left out. A test or
    validation part that is the only one is trained on. If no name stands for training or unlabeled, those that have a
    word for training next to another part's are for training.

    Raises ValueError if there is nothing to train on but both test and validation, or nothing at all.
    """
    by_part: dict[Part, list[tuple[str, T]]] = {}
    for name, value in named:
        by_part.setdefault(split_in(name) or "train", []).append((name, value))
    parts: Parts[T] = Parts()
    if not by_part.get("train") and not by_part.get("unlabeled"):
        both = [(name, value) for each in by_part.values() for name, value in each if "train" in _parts_in(name)]
        if both:
            moved = [name for name, _ in both]
            by_part = {part: [pair for pair in each if pair[0] not in moved] for part, each in by_part.items()}
            by_part["train"] = both
            parts.notes.append(f"taken for training, as their names say that, too, and no other does: {some(moved)}")
    validation = by_part.get("validation", [])
    tests = by_part.get("test", [])
    if tests and validation and labelled is not None:
        has_labels = [labelled([value for _, value in each]) for each in (tests, validation)]
        if has_labels == [False, True]:
            names = some(name for name, _ in tests)
            parts.notes.append(f"left out of what is to test on, as only what is for validation has labels: {names}")
            tests, validation = validation, []
    if tests and validation:
        names = some(name for name, _ in validation)
        parts.notes.append(f"left out for validation, as there is something to test on: {names}")
    parts.train = [value for _, value in by_part.get("train", [])]
    parts.test = [value for _, value in tests or validation]
    parts.unlabeled = [value for _, value in by_part.get("unlabeled", [])]
    if not parts.train:
        parts.train, parts.unlabeled = parts.unlabeled, []
    if not parts.train:
        names = some(name for name, _ in [*tests, *validation])
        if bool(tests) == bool(validation):
            raise ValueError(f"there is nothing to train on, by the names: {names or 'none'}")
        parts.notes.append(f"{names} stands alone, so it is trained on and a part of it held out")
        parts.train, parts.test = parts.test, []
    return parts
