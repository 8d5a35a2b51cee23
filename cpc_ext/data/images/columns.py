"""Choice of the columns of images and of labels in a table of Hugging Face's ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["of_type"]


def of_type(kind: str, kinds: Mapping[str, str], names: Sequence[str], notes: list[str]) -> str | None:
    """Return the column of a type, "Image" or "ClassLabel", or None if there is none.

    kinds: types by column, in the table's order. names: usual names of such a column, in order of preference, which
        decide between several columns of the type. notes: receives a remark if there are several.
    """
    found = [name for name, its in kinds.items() if its == kind]
    chosen = next(iter((*(name for name in names if name in found), *found)), None)
    others = ", ".join(name for name in found if name != chosen)
    if others:
        what = "images" if kind == "Image" else "labels"
        notes.append(f"{what} are taken from column {chosen}, and not from {others}")
    return chosen
