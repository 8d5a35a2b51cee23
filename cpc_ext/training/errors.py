"""How a run speaks to its user when something is wrong: one exception, printed without a traceback, and warnings.

Everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "EncodingsNotFiniteError",
    "TooFewExamplesError",
    "TrainingError",
    "speaker",
    "unfailing_output",
    "warn",
    "writing",
]


class TrainingError(Exception):
    """Training cannot start or go on; the message says why and what to do."""


class TooFewExamplesError(TrainingError):
    """The examples do not fill a batch. most: how large one may be."""

    def __init__(self, message: str, most: int) -> None:
        self.most = most
        super().__init__(message)


class EncodingsNotFiniteError(ValueError):
    """Encodings that are to be measured, and are infinite or NaN."""


@contextmanager
def writing(path: Path, option: str | None = None) -> Iterator[None]:
    """In the block, what the system says against writing is a TrainingError of the file or folder, and its option."""
    try:
        yield
    except OSError as error:
        named = "" if option is None else f"{option}: "
        raise TrainingError(f"{named}cannot write {path}: {error.strerror or error}") from None


def warn(message: str) -> None:
    """Print a warning, on a line of its own also where a progress bar is being drawn."""
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)


def speaker() -> str:
    """Which of several processes speaks."""
    return f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


@contextmanager
def unfailing_output() -> Iterator[None]:
    """In the block, what cannot be printed is lost, and nothing else: the disk of a log may be full, a pipe closed."""
    with redirect_stdout(_Unfailing(sys.stdout)), redirect_stderr(_Unfailing(sys.stderr)):
        yield


class _Unfailing:
    """A text stream that takes no notice of errors of the one that it writes to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, UnicodeEncodeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
