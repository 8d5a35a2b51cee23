"""Cache of decoded files: the key is a hash of the files' paths, sizes, times and inodes, and opening checks it.

A cache is written under a temporary name, forced to disk and renamed, under a file lock. So an interrupted run, a full
disk or a power cut never leaves half a cache, and of several processes only one decodes. Later damage is detected by
the size and by a checksum of blocks spread over the file, which takes milliseconds; the files are then decoded again.
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

# The checksum covers this many blocks, evenly spaced, so that damage to a thousandth of the file in one piece is found.
_BLOCKS, _BLOCK_BYTES = 1024, 4096

# Decodes files (second argument) into one file (first argument). Returns a description of the content as JSON values,
# and the reasons why files could not be decoded, by file index.
Build = Callable[[Path, list[Path]], tuple[dict[str, Any], dict[int, str]]]


# Transient errors, which may not occur the next time a file is read: of disks, networks and a process's limits.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}


def require_lasting(path: Path, error: Exception) -> None:
    """Raise ValueError for a transient error of reading a file, as a cache without that file would be wrong."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise ValueError(f"{path}: {error.strerror}; try again, or take the file away") from None


class _Unusable(Exception):
    """A cache is damaged, or was written by another version of the reader, which could not read all files."""


@dataclass(frozen=True)
class Kept:
    """An open cache.

    file: the decoded content. index: description of the content, from Build. reasons: why files are not in it.
    """

    file: Path
    index: dict[str, Any]
    reasons: dict[int, str]


@dataclass(frozen=True)
class DecodedCache:
    """The place of a cache of decoded files.

    root: the folder that contains the files. files: the files, with the properties that show changes.
    what: a noun for the content, in the plural; it also names the cache's file.
    form: everything else that determines the content, as JSON values. reader: the library that reads, and its version.
    variant: distinguishes caches of the same root, which are kept side by side.
    """

    root: Path
    files: Sequence[TreeFile]
    what: str
    form: list[Any]
    reader: tuple[str, str]
    variant: object

    def kept(self, build: Build) -> Kept:
        """Open the cache; if it is missing or damaged, build it with ``build`` first.

        Raises OSError if it cannot be written, and what ``build`` raises.
        """
        told = [(file.path, file.size, file.mtime_ns, file.ctime_ns, file.inode) for file in self.files]
        key = hashlib.sha256(json.dumps([*self.form, told]).encode()).hexdigest()[:32]
        home = self.root.resolve()
        source = hashlib.sha256(os.fsencode(home) + f"\n{self.variant}".encode()).hexdigest()[:16]
        # A file name may have 255 bytes, and a character takes up to four of them.
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
                # Everything else here belongs to an earlier state of the tree, or to an interrupted run.
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
        """Open a cache. Raises _Unusable if it is damaged or out of date, OSError if it may not be read."""
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
        # The content lists samples within a file that could not be read.
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
    """Return the digest of a cache's index and of blocks spread over its file, including the first and the last."""
    digest = hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16)
    with file.open("rb", buffering=0) as stream:
        end = max(os.fstat(stream.fileno()).st_size - _BLOCK_BYTES, 0)
        for offset in _spread(end):
            stream.seek(offset)
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _spread(end: int) -> list[int]:
    """Return evenly spaced offsets from 0 to end."""
    return sorted({end * block // (_BLOCKS - 1) for block in range(_BLOCKS)})
