"""Parts of messages that several packages share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["some"]

# How many names of a list a message gives; it counts the rest.
_NAMED = 5


def some(names: Iterable[str]) -> str:
    """Return the first names of a list and the number of the others, for a message."""
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
