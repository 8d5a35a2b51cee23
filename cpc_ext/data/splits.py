"""Which files are held out for testing where nothing says it, and which classes those of a tree have."""

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

# Whether what is held out is drawn, as it was up to version 0.1.0.
_DRAWN: ContextVar[bool] = ContextVar("_DRAWN", default=False)


@contextmanager
def drawn_tenths() -> Iterator[None]:
    """In the block, what is held out is what version 0.1.0 held out, for runs that were begun with it."""
    token = _DRAWN.set(True)
    try:
        yield
    finally:
        _DRAWN.reset(token)


def hold_out(files: Sequence[TreeFile], *, drawn: bool = False) -> tuple[list[TreeFile], list[TreeFile]]:
    """Divide files into training and about a tenth of every class for testing (none of a class of one).

    drawn: exactly a tenth, which is another one where the files are others.
    """
    testing = held_out([file.label for file in files], None if drawn else [file.path for file in files])
    return (
        [file for i, file in enumerate(files) if i not in testing],
        [file for i, file in enumerate(files) if i in testing],
    )


def held_out(labels: Sequence[Hashable], names: Sequence[str] | None) -> set[int]:
    """Indices of what is tested on of examples with these labels: a tenth of every class, none of a class of one.

    names: by which the examples are told from each other when others come to them. An example's name alone decides, by
    a hash, so that what was trained on once is not tested on later: about a tenth of a class, of two or more at least
    one, and never all. None: exactly a tenth is drawn.
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
    """A number in 0..1 that a name has and others nearly never share."""
    # A file name may hold bytes that are no text in any encoding.
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
    """The class names, or none where the files to train on have no labels; what had to be guessed goes to the notes.

    what: the files hold, in the plural.
    alike: it is a ValueError where some to test on are of no class of those to train on.
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
