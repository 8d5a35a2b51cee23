"""Default folders for decoded and downloaded data, and functions that force files to disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return the folder in the environment variable CPC_EXT_CACHE, else cpc_ext's in the user's cache folder."""
    chosen = os.environ.get("CPC_EXT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("cpc_ext"))


def datasets_dir(data_dir: str | Path | None) -> Path:
    """Return the folder of published data sets: data_dir if given, else "datasets" in the cache folder."""
    return cache_dir() / "datasets" if data_dir is None else Path(data_dir).expanduser()


def sync_file(path: Path) -> None:
    """Force a file's content to disk. Raises OSError if the disk turns out to be full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force a folder's entries, and so renames within it, to disk, if the file system supports that."""
    with suppress(OSError):
        sync_file(path)
