"""Two-way tables between another program's tensor names and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["NameMap", "under", "with_prefix"]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class NameMap:
    """Translates names by pairs of patterns, theirs and ours.

    ``{name}`` in a pattern matches one component of a dotted name, which is the same in both. The first pair that
    matches is used, so special cases come first.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = [(_compiled(theirs), theirs, _compiled(ours), ours) for theirs, ours in pairs]

    def ours(self, theirs: str) -> str | None:
        """Return our name for theirs, or None if no pair matches."""
        for pattern, _, _, ours in self._pairs:
            found = pattern.fullmatch(theirs)
            if found is not None:
                return ours.format(**found.groupdict())
        return None

    def theirs(self, ours: str) -> str | None:
        """Return their name for ours, or None if no pair matches."""
        for _, theirs, pattern, _ in self._pairs:
            found = pattern.fullmatch(ours)
            if found is not None:
                return theirs.format(**found.groupdict())
        return None


def _compiled(pattern: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(pattern)
    return re.compile(
        "".join(f"(?P<{part}>[^.]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    )


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names begin with ``prefix``, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries with ``prefix`` added to their names."""
    return {prefix + name: value for name, value in state.items()}
