"""Download of published archives of images and recordings: each is fetched, verified and unpacked once.

A file or folder with its final name is always complete. Bytes are written to a ".partial" file, which a later run
resumes; the archive gets its name once its checksum is right; its folder is renamed into place once it is unpacked and
on disk. Whatever a server sends, neither grows beyond the known size. Under a file lock one process does this, while
others wait for the result.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import re
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from tqdm import tqdm

from cpc_ext.data.cache import datasets_dir, sync_file, sync_folder

ATTEMPTS = 4
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 20
# Transient responses below 500: the same request may succeed the next time.
PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
GZIP_MARK = b"\x1f\x8b"
# Allowance in bytes for tar's headers, and for small text files next to the images or recordings.
UNPACKED_SLACK = 4 << 20


class DownloadError(OSError):
    """An archive could not be fetched, did not have its published checksum, or could not be unpacked."""


class _Broken(Exception):
    """A transfer ended early or cannot be resumed; another attempt may succeed."""


@dataclass(frozen=True)
class Archive:
    """A published .tar.gz archive.

    sha256: its checksum in hexadecimal. size: its size in bytes. unpacked: total bytes of the images or recordings.
    folder: the one folder that it unpacks to.
    """

    url: str
    sha256: str
    size: int
    unpacked: int
    folder: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def require_folder(archive: Archive, data_dir: str | Path | None, *, download: bool, or_folder: str = "") -> Path:
    """Return an archive's unpacked folder, which is in data_dir or is data_dir itself.

    data_dir: see :func:`datasets_dir`. download: fetch the archive if the folder is missing.
    or_folder: another folder that the caller looked for, to be named in the error.

    Raises FileNotFoundError if the folder is missing and download is False, DownloadError if fetching fails.
    """
    root = datasets_dir(data_dir)
    if root.name == archive.folder and root.is_dir():
        return root
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    if not download:
        folders = f"{archive.folder!r} or {or_folder!r}" if or_folder else repr(archive.folder)
        raise FileNotFoundError(
            f"no folder {folders} in {root}: pass --download to fetch it from {archive.url}, "
            "or --data-dir with the folder that holds it"
        )
    return download_archive(archive, root)


def download_archive(archive: Archive, root: Path) -> Path:
    """Fetch, verify and unpack an archive into root / archive.folder; return that path. Does nothing if it is there.

    An archive file already in root is verified and used, and is removed once it is unpacked. Raises DownloadError; an
    archive with a wrong checksum is deleted, an incomplete one stays for the next call to resume.
    """
    folder = root / archive.folder
    file = root / archive.file_name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{archive.folder}.lock"):
            if folder.is_dir():
                return folder
            if not file.exists():
                partial = file.with_name(file.name + ".partial")
                _fetch(archive, partial)
                _verify(partial, archive)
                partial.rename(file)
            else:
                _verify(file, archive)
            _unpack(file, archive, root)
            file.unlink()
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"cannot fetch {archive.file_name} into {root}: {error}") from error
    return folder


def _fetch(archive: Archive, partial: Path) -> None:
    """Append the missing bytes of the archive to `partial`, with further attempts if the connection breaks."""
    url = archive.url
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2**attempt)
        try:
            _fetch_rest(archive, partial)
            return
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in PASSING:
                raise DownloadError(f"{url}: {problem}") from error
        except urllib.error.URLError as error:
            problem = str(error.reason)
        except _Broken as error:
            problem = str(error)
    raise DownloadError(
        f"{url}: {problem} ({ATTEMPTS} attempts; {_size(partial)} bytes kept in {partial} to resume from)"
    )


def _fetch_rest(archive: Archive, partial: Path) -> None:
    """Request the bytes that `partial` lacks, once. Raises _Broken if some are still missing."""
    have = _size(partial)
    if have > archive.size:
        partial.unlink()  # No part of this archive.
        have = 0
    if have == archive.size:
        return
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        # The server's file is shorter than ours, which therefore cannot be a part of it: fetch all of it again.
        partial.unlink()
        raise _Broken(f"HTTP {error.code} {error.reason}") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Broken(str(error) or type(error).__name__) from error
    with response:
        start = _start(archive, response, have)
        with (
            partial.open("ab" if start else "wb") as out,
            tqdm(
                desc=archive.file_name, total=archive.size, initial=start, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while chunk := _read(response):
                if not start and not out.tell() and not chunk.startswith(GZIP_MARK[: len(chunk)]):
                    raise DownloadError(f"{archive.url}: expected a .tar.gz, got something that begins {chunk[:40]!r}")
                if out.tell() + len(chunk) > archive.size:
                    raise DownloadError(f"{archive.url}: expected {archive.size} bytes, got more")
                out.write(chunk)
                bar.update(len(chunk))
            if out.tell() < archive.size:
                raise _Broken("the connection closed early")


def _start(archive: Archive, response: http.client.HTTPResponse, have: int) -> int:
    """Return the offset in the archive of a response's bytes: `have`, or 0."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        found = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", found.strip())
        if match is None or int(match[1]) != have or match[2] not in (str(archive.size), "*"):
            raise DownloadError(f"{archive.url}: expected bytes from {have} of {archive.size}, got {found!r}")
        return have
    # A response of 200 to a range request: the server does not support ranges and sends the whole file.
    if response.status != HTTPStatus.OK:
        raise _Broken(f"HTTP {response.status} {response.reason}")
    length = response.headers.get("Content-Length", "").strip()
    # A length that is not a number is ignored; the bytes are counted in any case.
    if re.fullmatch(r"\d{1,18}", length) and int(length) != archive.size:
        raise DownloadError(f"{archive.url}: expected {archive.size} bytes, the server has {length}")
    return 0


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _verify(file: Path, archive: Archive) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != archive.sha256:
        size = _size(file)
        file.unlink()
        raise DownloadError(
            f"{file}: expected {archive.size} bytes of SHA-256 {archive.sha256}, found {size} bytes of "
            f"{digest.hexdigest()}; the file has been deleted"
        )


class _Bounded(io.RawIOBase):
    """A stream that raises an error when it yields more bytes than a limit."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._left = limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(min(size if size >= 0 else CHUNK_BYTES, self._left + 1))
        self._left -= len(chunk)
        if self._left < 0:
            raise tarfile.ReadError("it holds more than was published")
        return chunk


def _unpack(file: Path, archive: Archive, root: Path) -> None:
    """Unpack under a temporary name, then rename, so that a half-unpacked folder never has the final name."""
    folder = archive.folder
    aside = root / f".{folder}.unpacking"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with (
            file.open("rb") as stream,
            tqdm.wrapattr(
                stream, "read", desc=f"unpacking {file.name}", total=file.stat().st_size, disable=None
            ) as read,
            gzip.GzipFile(fileobj=read, mode="rb") as plain,  # type: ignore[call-overload]  # It is the stream, wrapped.
            tarfile.open(fileobj=_Bounded(plain, archive.unpacked + UNPACKED_SLACK), mode="r|") as members,
        ):
            for member in members:
                _extract(members, member, aside)
        if not (aside / folder).is_dir():
            raise DownloadError(f"{file}: expected a folder {folder!r} inside, found none")
        for path in (aside / folder).rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        sync_folder(aside / folder)
        (aside / folder).rename(root / folder)
        sync_folder(root)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{file}: cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _extract(members: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Extract the content of a file or folder of an archive: no links, no owner or mode, nothing outside the folder.

    The filters of the standard library do the same, but not in the first releases of Python 3.10 and 3.11.
    """
    name = os.path.normpath(member.name.lstrip("/"))
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise tarfile.ReadError(f"{member.name!r} is neither a file nor a folder")
    if name == ".." or name.startswith("../"):
        raise tarfile.ReadError(f"{member.name!r} lies outside")
    path = folder / name
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = members.extractfile(member)
    assert content is not None  # It is a file.
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file, CHUNK_BYTES)
