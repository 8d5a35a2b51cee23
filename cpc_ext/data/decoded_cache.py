"""Decoded files kept in a folder of the user's cache: found by what tells the files apart, checked when opened.

A cache is written aside, forced to disk and renamed under a file lock, so an interrupted run, a full disk or a power
cut never leaves half of one, and of several processes one decodes. Whatever damages it later is found by its size and
by a checksum of places spread over it, few enough to cost milliseconds; then the files are decoded again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cpc_ext.data.cache import cache_dir, sync_folder
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.notice import tell

# The checksum is of this many blocks, evenly spaced: a stretch of a thousandth of the file does not go unseen.
_BLOCKS, _BLOCK_BYTES = 1024, 4096

# Decodes files into the file that is named first. Gives what is to be known of it, as JSON values, and why files could
# not be decoded, by their index.
Build = Callable[[Path, list[Path]], tuple[dict[str, Any], dict[int, str]]]


# Errors that a file may not give the next time it is read: of disks, networks, and what a process may have.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}


def require_lasting(path: Path, error: Exception) -> None:
    """ValueError where the error of reading a file may pass, so that a cache without the file would be wrong."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise ValueError(f"{path}: {error.strerror}; try again, or take the file away") from None


class _Unusable(Exception):
    """A cache is not as it was written, or another version of the reader may make more of the files."""


@dataclass(frozen=True)
class Kept:
    """What is kept: the file of it, what was told of it when it was made, and why files have no part in it."""

    file: Path
    index: dict[str, Any]
    reasons: dict[int, str]


@dataclass(frozen=True)
class DecodedCache:
    """A place for what is made of files.

    root: the folder that they are below. files: which, and what tells that they changed.
    what: they hold, in the plural; it also names the file that keeps it.
    form: whatever else decides what is made of them, as JSON values. reader: what reads them, and its version.
    variant: of several caches of one root that are kept beside each other, which one.
    """

    root: Path
    files: Sequence[TreeFile]
    what: str
    form: list[Any]
    reader: tuple[str, str]
    variant: object

    def kept(self, build: Build) -> Kept:
        """What was made of the files, by ``build`` where it is not there as it should be.

        Raises OSError where it cannot be kept, and what ``build`` raises.
        """
        told = [(file.path, file.size, file.mtime_ns, file.ctime_ns, file.inode) for file in self.files]
        key = hashlib.sha256(json.dumps([*self.form, told]).encode()).hexdigest()[:32]
        home = self.root.resolve()
        source = hashlib.sha256(os.fsencode(home) + f"\n{self.variant}".encode()).hexdigest()[:16]
        # A name may have 255 bytes, of which a character takes up to four.
        parent = cache_dir() / "folders" / f"{home.name[:48]}-{source}"
        directory = parent / key
        try:
            if directory.is_dir():
                try:
                    return self._open(directory)
                except _Unusable:
                    pass
            parent.mkdir(parents=True, exist_ok=True)
            with self._locked(Path(f"{parent}.lock")):
                if directory.is_dir():
                    try:
                        return self._open(directory)  # Another process has just decoded them.
                    except _Unusable as reason:
                        again = f"the {self.what} kept here do not serve ({reason}), so they are decoded again"
                        tell(directory, [again], found_by_all=False)
                # Whatever else is here belongs to an earlier state of the tree or to a run that was cut short.
                for stale in parent.iterdir():
                    shutil.rmtree(stale, ignore_errors=True)
                self._build(directory, build)
            return self._open(directory)
        except (OSError, NotImplementedError, _Unusable) as error:
            # NotImplementedError: the file system has no locks.
            problem = (
                f"cannot keep the decoded {self.what} of {self.root} in {parent} "
                f"({getattr(error, 'strerror', None) or error}); CPC_EXT_CACHE names another cache folder"
            )
            number = getattr(error, "errno", None)
            raise (OSError(problem) if number is None else OSError(number, problem)) from error

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(self.root, [f"waiting for the process that decodes the {self.what}"])
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _open(self, directory: Path) -> Kept:
        """What a cache holds. Raises _Unusable, OSError where it may not be read."""
        file = directory / f"{self.what}.bin"
        try:
            index = json.loads((directory / "index.json").read_bytes())
            digest, expected = index.pop("digest"), index["bytes"]
            size = file.stat().st_size
            if size != expected:
                raise _Unusable(f"{file.name} has {size} bytes, not {expected}")
            if _digest(index, file) != digest:
                raise _Unusable("their checksum is wrong")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _Unusable(f"{os.path.basename(error.filename or 'a file')} is missing") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _Unusable("index.json holds something else") from None
        name, version = self.reader
        # Samples within a file that could not be read are told with the content.
        left_out = index["reasons"] or index["content"].get("reasons")
        if left_out and index["version"] != version:
            raise _Unusable(f"{name} {index['version']} could not read all of them, this is {version}")
        reasons = {number: reason for reason, numbers in index["reasons"].items() for number in numbers}
        return Kept(file, index["content"], reasons)

    def _build(self, directory: Path, build: Build) -> None:
        aside = directory.with_name(f"{directory.name}.building")
        aside.mkdir()
        try:
            file = aside / f"{self.what}.bin"
            content, reasons = build(file, [self.root / entry.path for entry in self.files])
            if len(reasons) == len(self.files):
                first = f"{self.files[0].path}: {reasons[0]}"
                count = len(self.files)
                raise ValueError(f"{self.root}: none of the {count} {self.what} could be read, first {first}")
            numbers: dict[str, list[int]] = {}
            for number, reason in reasons.items():
                numbers.setdefault(reason, []).append(number)
            index: dict[str, Any] = {
                "bytes": file.stat().st_size,
                "content": content,
                "reasons": numbers,
                "version": self.reader[1],
            }
            index["digest"] = _digest(index, file)
            with (aside / "index.json").open("w") as out:
                json.dump(index, out)
                out.flush()
                os.fsync(out.fileno())
            sync_folder(aside)
            aside.rename(directory)
            sync_folder(directory.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _digest(index: dict[str, Any], file: Path) -> str:
    """The digest of what a cache says of its content, and of blocks spread over this, first and last among them."""
    digest = hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16)
    with file.open("rb", buffering=0) as stream:
        end = max(os.fstat(stream.fileno()).st_size - _BLOCK_BYTES, 0)
        for offset in _spread(end):
            stream.seek(offset)
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _spread(end: int) -> list[int]:
    """Offsets from 0 to end, evenly spaced."""
    return sorted({end * block // (_BLOCKS - 1) for block in range(_BLOCKS)})
