"""Total duration of the user's own recordings, from their headers, by which a run's defaults are chosen."""

from __future__ import annotations

from pathlib import Path

from cpc_ext.data.audio.decode import library, read_recordings

__all__ = ["total_minutes"]


def total_minutes(root: Path, *, enough: float) -> float | None:
    """Return the minutes of the recordings below a folder, or stop counting at ``enough``.

    Returns None if no recording can be read; loading the data set then reports the reason.
    """
    try:
        tree = read_recordings(root.expanduser())
    except (ImportError, OSError, ValueError):
        return None
    minutes = 0.0
    for file in (*tree.train, *tree.test):
        # libsndfile raises RuntimeErrors, and reading a file may raise others.
        try:
            minutes += library("soundfile").info(root.expanduser() / file.path).duration / 60
        except Exception:
            continue
        if minutes >= enough:
            break
    return minutes or None
