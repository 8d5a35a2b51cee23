"""How a run speaks to its user when something is wrong: one exception, printed without a traceback, and warnings.

Everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["TrainingError", "warn"]


class TrainingError(Exception):
    """Training cannot start or go on; the message says why and what to do."""


def warn(message: str) -> None:
    """Print a warning, on a line of its own also where a progress bar is being drawn."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
