"""Published archives of images: fetched, verified and unpacked, once.

Nothing that looks finished is ever unfinished: bytes arrive in a ".partial" file that a later run resumes, the archive
gets its name when its checksum is right, and its folder appears by a rename when it is unpacked. A file lock lets one
process do this while others wait for the result.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from cpc_ext.data.cache import cache_dir

ATTEMPTS = 4
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 20


class DownloadError(OSError):
    """An archive could not be fetched, did not have its published checksum, or could not be unpacked."""


@dataclass(frozen=True)
class Archive:
    """A published .tar.gz with the one folder it unpacks to. md5 in hexadecimal."""

    url: str
    md5: str
    folder: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def require_folder(archive: Archive, data_dir: str | Path | None, *, download: bool) -> Path:
    """The unpacked folder of an archive, in data_dir (or data_dir itself); fetched first where `download` allows it.

    Without data_dir the place is "datasets" in the cache folder. Raises FileNotFoundError where the folder is missing
    and may not be fetched, DownloadError where fetching fails.
    """
    root = cache_dir() / "datasets" if data_dir is None else Path(data_dir).expanduser()
    if root.name == archive.folder and root.is_dir():
        return root
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    if not download:
        raise FileNotFoundError(
            f"no folder {archive.folder!r} in {root}: pass --download to fetch it from {archive.url}, "
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
                _fetch(archive.url, partial)
                _verify(partial, archive.md5)
                partial.rename(file)
            else:
                _verify(file, archive.md5)
            _unpack(file, archive.folder, root)
            file.unlink()
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"cannot fetch {archive.file_name} into {root}: {error}") from error
    return folder


def _fetch(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks of the file at url, trying again where the connection breaks off."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2**attempt)
        try:
            if _fetch_rest(url, partial):
                return
            problem = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
            problem = f"HTTP {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = str(getattr(error, "reason", error))
    kept = partial.stat().st_size if partial.exists() else 0
    raise DownloadError(f"{url}: {problem} ({ATTEMPTS} attempts; {kept} bytes kept in {partial} to resume from)")


def _fetch_rest(url: str, partial: Path) -> bool:
    """One request for the bytes that `partial` lacks. True when the file is as long as the server says."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing lies beyond what we have: it is complete, or no prefix of this file and to be fetched anew.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        partial.unlink()
        return False
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DownloadError(f"{url}: asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            partial.open("ab" if resumed else "wb") as out,
            tqdm(
                desc=url.rsplit("/", 1)[-1], total=total, initial=start, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                bar.update(len(chunk))
            return total is None or out.tell() == total


def _verify(file: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        file.unlink()
        raise DownloadError(f"{file}: expected MD5 {md5}, found {digest.hexdigest()}; the file has been deleted")


def _unpack(file: Path, folder: str, root: Path) -> None:
    """Unpack next to the final place, then rename, so that a half-unpacked folder never has the final name."""
    aside = root / f".{folder}.unpacking"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with (
            file.open("rb") as stream,
            tqdm.wrapattr(
                stream, "read", desc=f"unpacking {file.name}", total=file.stat().st_size, disable=None
            ) as read,
            tarfile.open(fileobj=read, mode="r|gz") as archive,
        ):
            archive.extractall(aside, filter="data")
        if not (aside / folder).is_dir():
            raise DownloadError(f"{file}: expected a folder {folder!r} inside, found none")
        (aside / folder).rename(root / folder)
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DownloadError(f"{file}: cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
