"""Errors and warnings for the user of a run: TrainingError, which is printed without a traceback, and :func:`warn`.

Any other exception is a bug and keeps its traceback.
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
    """The examples do not fill a batch. most: the largest batch size that they fill."""

    def __init__(self, message: str, most: int) -> None:
        self.most = most
        super().__init__(message)


class EncodingsNotFiniteError(ValueError):
    """Encodings that were to be measured are infinite or NaN."""


@contextmanager
def writing(path: Path, option: str | None = None) -> Iterator[None]:
    """Raise an OSError in the block as a TrainingError that names the file or folder and its option."""
    try:
        yield
    except OSError as error:
        named = "" if option is None else f"{option}: "
        raise TrainingError(f"{named}cannot write {path}: {error.strerror or error}") from None


def warn(message: str) -> None:
    """Print a warning on its own line, even while a progress bar is drawn."""
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)


def speaker() -> str:
    """Return a prefix for messages that names this process's rank; empty for a single process."""
    return f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Drop output in the block that cannot be printed, as when a log's disk is full or a pipe is closed."""
    with redirect_stdout(_Unfailing(sys.stdout)), redirect_stderr(_Unfailing(sys.stderr)):
        yield


class _Unfailing:
    """A text stream that ignores the errors of the stream that it writes to."""

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
