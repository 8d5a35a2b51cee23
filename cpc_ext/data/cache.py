"""Where decoded and downloaded images are kept when the caller names no place."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder named by the environment variable CPC_EXT_CACHE, else the user's cache folder of this system."""
    chosen = os.environ.get("CPC_EXT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("cpc_ext"))
