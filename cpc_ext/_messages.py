"""What messages of several rooms are made of."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["some"]

# Names that are given of a list; the rest is counted.
_NAMED = 5


def some(names: Iterable[str]) -> str:
    """The first names of a list and how many more there are, for a message."""
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
