"""Which files are held out for testing where nothing says it, and which classes those of a tree have."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.file_tree import TreeFile

HELD_OUT = 0.1


def hold_out(files: Sequence[TreeFile]) -> tuple[list[TreeFile], list[TreeFile]]:
    """Divide files into training and a tenth of every class for testing (none of a class of one)."""
    testing = held_out([file.label for file in files])
    return (
        [file for i, file in enumerate(files) if i not in testing],
        [file for i, file in enumerate(files) if i in testing],
    )


def held_out(labels: Sequence[Hashable]) -> set[int]:
    """Indices of what is tested on of examples with these labels: a tenth of every class, none of a class of one."""
    by_class: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    rng = np.random.default_rng(0)
    chosen: set[int] = set()
    for members in by_class.values():
        count = max(round(len(members) * HELD_OUT), min(1, len(members) - 1))
        chosen.update(rng.permutation(members)[:count].tolist())
    return chosen


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
