"""Atomic writing: a file is either as it was or complete, whatever happens while it is written.

Content goes to a temporary file beside the target, is synced to disk, and takes the target's name in one rename. Then
the folder is synced too, since it holds the new name.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "replace_with_link", "write_text"]

_COPIED_AT_ONCE = 2**22


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at ``path`` only when the block ends without an exception.

    Several processes may write the same path at once: each writes its own temporary file, and the last to finish wins.
    Raises OSError if writing fails; the temporary file is then removed and what was at ``path`` is intact.
    """
    temporary, file = _open_temporary(path)
    try:
        # Close the file only after the rename: its lock tells other processes that it is in use.
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text to ``path`` in UTF-8. Raises OSError if writing fails; what was there is then intact."""
    with atomic_file(path) as file:
        file.write(text.encode())


def replace_with_link(source: Path, target: Path) -> None:
    """Replace ``target`` atomically with a hard link to ``source``, or with a copy where there can be no link.

    Both must be files that are only ever replaced, never written in place. A copy is made where the file system has no
    hard links or the file has as many as are allowed. Raises OSError if copying fails too.
    """
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        # The errno of a link that is impossible differs between systems (EPERM, ENOTSUP, EMLINK, EXDEV, ENOSYS ...).
        # For any other reason, such as a full disk, the copy fails too.
        with open(source, "rb") as original, atomic_file(target) as copy:
            shutil.copyfileobj(original, copy, _COPIED_AT_ONCE)
        return
    try:
        os.replace(temporary, target)
    finally:
        # The temporary link remains if the rename failed, or did nothing because both names are links to one file.
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """Open a new temporary file beside ``path``, locked while it is open; remove those that killed processes left."""
    _remove_abandoned(path)
    while True:
        temporary = _temporary(path)
        file = open(temporary, "xb")  # noqa: SIM115 - closed by the caller
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                return temporary, file
        except BlockingIOError:
            pass
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
        # Another process removed the file as abandoned before it was locked.
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of ``path`` that no process has locked, and those of old versions without numbers."""
    for name in glob.glob(f".{glob.escape(path.name)}.*tmp", root_dir=path.parent):
        with suppress(OSError), open(path.parent / name, "r+b") as file:
            if _lock(file):
                (path.parent / name).unlink()


def _lock(file: BinaryIO) -> bool:
    """Lock a file; return False if the file system has no locks.

    Raises BlockingIOError if another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems do not support fsync on folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
