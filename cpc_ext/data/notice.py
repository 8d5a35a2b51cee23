"""What a data set has to say about its files: one warning, from one process, with the files grouped by the reason."""

from __future__ import annotations

import os
import re
import warnings

from cpc_ext._messages import some


class LeftOut:
    """Files that a data set does not take, by the reason.

    what: what they are, in the plural.

    Reasons that differ in nothing but numbers ("12 bytes missing") are one, in the words of the first.
    """

    def __init__(self, what: str = "images") -> None:
        self._what = what
        self._groups: dict[str, tuple[str, list[str]]] = {}

    def add(self, path: str, reason: str) -> None:
        self._groups.setdefault(re.sub(r"\d+", "#", reason), (reason, []))[1].append(path)

    def __len__(self) -> int:
        return sum(len(paths) for _, paths in self._groups.values())

    def lines(self) -> list[str]:
        """A heading and a line for each reason; empty where nothing was left out."""
        if not self._groups:
            return []
        return [f"left out {len(self)} {self._what}:"] + [
            f"  {len(paths)}: {reason} ({some(paths)})" for reason, paths in self._groups.values()
        ]


def tell(source: object, lines: list[str], *, found_by_all: bool = True) -> None:
    """Warn of what was found in a source (a folder), if anything was.

    found_by_all: by every process that torchrun starts, as each opens the data; then the one of rank 0 says it.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or not found_by_all
    if lines and (alone or os.environ.get("RANK", "0") == "0"):
        warnings.warn("\n  ".join([f"{source}:", *lines]), stacklevel=3)
