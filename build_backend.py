"""Build backend of scikit-build-core, extended to build from sources that cannot be written to.

Builds go to ``build/{wheel_tag}`` in the source tree, so that the next one compiles only what has changed. Where that
is not possible, as in a read-only checkout or one that another user has built in, they go to a temporary folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from scikit_build_core import build as scikit_build
from scikit_build_core.build import *  # noqa: F403


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel, as PEP 517 specifies."""
    return scikit_build.build_wheel(wheel_directory, _where_possible(config_settings), metadata_directory)


def _where_possible(config_settings):
    """Return the settings, with a temporary build folder if the source tree takes none and the user has named none."""
    settings = dict(config_settings or {})
    named = "SKBUILD_BUILD_DIR" in os.environ or {"build-dir", "skbuild.build-dir"} & settings.keys()
    if not named and not _writable():
        settings["build-dir"] = ""  # A temporary one.
    return settings


def _writable() -> bool:
    folder = Path(__file__).parent / "build"
    folders = [folder, *folder.glob("cp*")] if folder.exists() else [folder.parent]
    return all(os.access(folder, os.W_OK | os.X_OK) for folder in folders)
