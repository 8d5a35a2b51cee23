"""Warnings of a data set about its files: one warning, from one process, with left-out files grouped by reason."""

from __future__ import annotations

import os
import re
import warnings

from cpc_ext._messages import some


class LeftOut:
    """Files that a data set leaves out, grouped by reason.

    what: noun for the files, in the plural.

    Reasons that differ only in numbers ("12 bytes missing") form one group, worded as the first.
    """

    def __init__(self, what: str = "images") -> None:
        self._what = what
        self._groups: dict[str, tuple[str, list[str]]] = {}

    def add(self, path: str, reason: str) -> None:
        self._groups.setdefault(re.sub(r"\d+", "#", reason), (reason, []))[1].append(path)

    def __len__(self) -> int:
        return sum(len(paths) for _, paths in self._groups.values())

    def lines(self) -> list[str]:
        """Return a heading and a line for each reason, or no lines if nothing was left out."""
        if not self._groups:
            return []
        return [f"left out {len(self)} {self._what}:"] + [
            f"  {len(paths)}: {reason} ({some(paths)})" for reason, paths in self._groups.values()
        ]


def tell(source: object, lines: list[str], *, found_by_all: bool = True) -> None:
    """Warn of the findings (lines) about a source, such as a folder, if there are any.

    found_by_all: whether every process that torchrun starts finds them, as each opens the data; then only rank 0 warns.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or not found_by_all
    if lines and (alone or os.environ.get("RANK", "0") == "0"):
        warnings.warn("\n  ".join([f"{source}:", *lines]), stacklevel=3)
