"""Where decoded and downloaded data are kept when the caller names no place, and what makes them last."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder named by the environment variable CPC_EXT_CACHE, else the user's cache folder of this system."""
    chosen = os.environ.get("CPC_EXT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("cpc_ext"))


def datasets_dir(data_dir: str | Path | None) -> Path:
    """The folder of published data sets: the one that the caller names, else "datasets" in the cache folder."""
    return cache_dir() / "datasets" if data_dir is None else Path(data_dir).expanduser()


def sync_file(path: Path) -> None:
    """Force a file's content to disk. Raises OSError where it does not fit there after all."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force the names in a folder to disk, which a rename is part of, where the file system knows how to."""
    with suppress(OSError):
        sync_file(path)
