"""Ctrl-C and SIGTERM as a request: the loop looks at it between steps, saves, and leaves.

The first signal only takes a note and puts the system's own handling back, so that a second one ends the process at
once, whatever it is doing.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which SIGINT and SIGTERM set :attr:`signal` instead of ending the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 without a request."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        print(
            f"\n{self.signal.name}: finishing this step and saving; once more ends at once", file=sys.stderr, flush=True
        )
