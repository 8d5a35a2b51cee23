"""Which columns of a table, as Hugging Face's ``datasets`` has them, are its images and its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["of_type"]


def of_type(kind: str, kinds: Mapping[str, str], names: Sequence[str], notes: list[str]) -> str | None:
    """The column of a type, "Image" or "ClassLabel"; None where there is none.

    kinds: types by column, in the table's order. names: that such a column usually has, of which the first counts where
        several columns are of the type. notes: where it goes that there are several.
    """
    found = [name for name, its in kinds.items() if its == kind]
    chosen = next(iter((*(name for name in names if name in found), *found)), None)
    others = ", ".join(name for name in found if name != chosen)
    if others:
        what = "images" if kind == "Image" else "labels"
        notes.append(f"{what} are taken from column {chosen}, and not from {others}")
    return chosen
