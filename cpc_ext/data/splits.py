"""Choice of files to hold out for testing where a data set has no test split, and class names of a tree's files."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.file_tree import TreeFile

HELD_OUT = 0.1

# Whether held-out files are drawn at random, as they were up to version 0.1.0.
_DRAWN: ContextVar[bool] = ContextVar("_DRAWN", default=False)


@contextmanager
def drawn_tenths() -> Iterator[None]:
    """Within the block, hold out the files that version 0.1.0 held out, for runs that were begun with it."""
    token = _DRAWN.set(True)
    try:
        yield
    finally:
        _DRAWN.reset(token)


def hold_out(files: Sequence[TreeFile], *, drawn: bool = False) -> tuple[list[TreeFile], list[TreeFile]]:
    """Divide files into those for training and, for testing, about a tenth of every class (none of a class of one).

    drawn: draw exactly a tenth at random, so that the choice changes when files are added.
    """
    testing = held_out([file.label for file in files], None if drawn else [file.path for file in files])
    return (
        [file for i, file in enumerate(files) if i not in testing],
        [file for i, file in enumerate(files) if i in testing],
    )


def held_out(labels: Sequence[Hashable], names: Sequence[str] | None) -> set[int]:
    """Choose examples to test on: a tenth of every class, none of a class of one. Returns their indices.

    labels: class of each example.
    names: unique names of the examples. The hash of a name decides, so that examples added later do not turn training
        examples into test examples; this holds out about a tenth of a class, and of two or more at least one, but never
        all. None: draw exactly a tenth at random.
    """
    by_class: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    if names is None or _DRAWN.get():
        return _drawn(by_class.values())
    chosen: set[int] = set()
    for members in by_class.values():
        by_hash = sorted((_hash(names[i]), i) for i in members)
        count = sum(value < HELD_OUT for value, _ in by_hash)
        count = min(max(count, 1), len(members) - 1)
        chosen.update(i for _, i in by_hash[:count])
    return chosen


def _drawn(classes: Iterable[list[int]]) -> set[int]:
    rng = np.random.default_rng(0)
    chosen: set[int] = set()
    for members in classes:
        count = max(round(len(members) * HELD_OUT), min(1, len(members) - 1))
        chosen.update(rng.permutation(members)[:count].tolist())
    return chosen


def _hash(name: str) -> float:
    """Return a hash of a name, in 0..1."""
    # A file name may hold bytes that are not valid in the file system's encoding.
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def class_names(
    root: Path,
    training: Sequence[TreeFile],
    testing: Sequence[TreeFile],
    what: str,
    notes: list[str],
    *,
    alike: bool = True,
) -> tuple[str, ...]:
    """Return the class names, or none if the training files have no labels. The notes receive what had to be guessed.

    what: noun for the files, in the plural.
    alike: raise ValueError if a test file's class has no training files.
    """
    classes = sorted({file.label for file in training})
    if len(classes) < 2:
        return ()
    for part, files in (("", training), ("test ", testing)):
        stray = [file.path for file in files if not file.label]
        if stray:
            notes.append(f"{some(stray)} is in no class folder, so the {part}{what} have no labels")
            if files is training:
                return ()
    unknown = sorted({file.label for file in testing} - {*classes, ""})
    if alike and unknown:
        raise ValueError(
            f"{root}: the test {what} have classes that the training {what} lack: {', '.join(unknown)} (training: "
            f"{some(classes)}; upper and lower case count)"
        )
    return tuple(classes)
