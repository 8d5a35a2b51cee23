"""Files that are either as they were or complete, whatever happens while they are written.

Content goes to a temporary file beside the target, is forced to disk, and takes the target's name in one rename; then
the folder is forced to disk as well, since the new name is part of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "replace_with_link"]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at ``path`` only when the block ends without an exception.

    One process may write a path at a time. Raises OSError where writing fails; then the temporary file is gone and what
    was at ``path`` is intact.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def replace_with_link(source: Path, target: Path) -> None:
    """Make ``target`` name the content of ``source``, in one step and without writing it a second time.

    Both must be files that are only ever replaced, never written in place. Raises OSError where it fails, also on file
    systems without hard links.
    """
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, target)
    _sync_folder(target.parent)


def _temporary(path: Path) -> Path:
    # One fixed name: what a killed process leaves behind is overwritten by the next write instead of piling up.
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
