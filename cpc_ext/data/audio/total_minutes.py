"""How long the user's own recordings are together, from their heads: what chooses a run's defaults."""

from __future__ import annotations

from pathlib import Path

from cpc_ext.data.audio.decode import library, read_recordings

__all__ = ["total_minutes"]


def total_minutes(root: Path, *, enough: float) -> float | None:
    """Minutes of the recordings below a folder, or as many of them as it takes to see that they are enough.

    None where none can be read, of which whoever loads them tells more.
    """
    try:
        tree = read_recordings(root.expanduser())
    except (ImportError, OSError, ValueError):
        return None
    minutes = 0.0
    for file in (*tree.train, *tree.test):
        # libsndfile's errors are RuntimeErrors, and those of a file's reader may be any.
        try:
            minutes += library("soundfile").info(root.expanduser() / file.path).duration / 60
        except Exception:
            continue
        if minutes >= enough:
            break
    return minutes or None
