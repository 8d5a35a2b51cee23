"""Files that are either as they were or complete, whatever happens while they are written.

Content goes to a temporary file beside the target, is forced to disk, and takes the target's name in one rename; then
the folder is forced to disk as well, since the new name is part of it.
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

    Several processes may write a path at a time: each writes a file of its own, and the last to end stays. Raises
    OSError where writing fails; then the temporary file is gone and what was at ``path`` is intact.
    """
    temporary, file = _open_temporary(path)
    try:
        # Closed last: while it is open, its lock tells others that it is in use.
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
    """Make a text, in UTF-8, what is at ``path``. OSError where writing fails; what was there is then intact."""
    with atomic_file(path) as file:
        file.write(text.encode())


def replace_with_link(source: Path, target: Path) -> None:
    """Make ``target`` name the content of ``source``, in one step, and without writing it a second time where it can.

    Both must be files that are only ever replaced, never written in place. File systems without hard links, and those
    that have as many of the file as they allow, get a copy. Raises OSError where that fails too.
    """
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        # Why there can be no link differs between systems (EPERM, ENOTSUP, EMLINK, EXDEV, ENOSYS ...), and where the
        # reason is another, such as a full disk, the copy fails of it as well.
        with open(source, "rb") as original, atomic_file(target) as copy:
            shutil.copyfileobj(original, copy, _COPIED_AT_ONCE)
        return
    try:
        os.replace(temporary, target)
    finally:
        # It is still there where that failed, and where both were names of one file already.
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, locked for as long as it is open; what killed processes left of others is removed."""
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
        # Before it was locked another process took it for abandoned.
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of ``path`` that no process has locked, also those of before they had numbers."""
    for name in glob.glob(f".{glob.escape(path.name)}.*tmp", root_dir=path.parent):
        with suppress(OSError), open(path.parent / name, "r+b") as file:
            if _lock(file):
                (path.parent / name).unlink()


def _lock(file: BinaryIO) -> bool:
    """Lock a file; False where the file system has no locks. BlockingIOError where another process has locked it."""
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
        # Some network and FUSE file systems keep no folders that could be forced to a disk.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
