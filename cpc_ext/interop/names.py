"""Names of another program's tensors and ours, as one table that is read both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["NameMap", "under", "with_prefix"]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class NameMap:
    """Pairs of patterns, theirs and ours.

    ``{name}`` in a pattern stands for one part of a dotted name, the same in both. Of several pairs that fit a name the
    first counts, so that special cases come first.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = [(_compiled(theirs), theirs, _compiled(ours), ours) for theirs, ours in pairs]

    def ours(self, theirs: str) -> str | None:
        """Our name of theirs; None where no pair fits."""
        for pattern, _, _, ours in self._pairs:
            found = pattern.fullmatch(theirs)
            if found is not None:
                return ours.format(**found.groupdict())
        return None

    def theirs(self, ours: str) -> str | None:
        """Their name of ours; None where no pair fits."""
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
    """The entries whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries with ``prefix`` in front of their names."""
    return {prefix + name: value for name, value in state.items()}
