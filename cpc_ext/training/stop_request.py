"""Signals such as Ctrl-C and SIGTERM as requests to stop: the loop checks for one between steps, saves, and exits.

The first signal is only recorded, and restores the default handling of Ctrl-C, SIGTERM and SIGHUP, so that a second one
of them ends the process at once. The warnings of batch systems, SIGUSR1 and SIGUSR2, may be repeated. Under torchrun
each process may get the same signal twice, from the terminal and from torchrun, so a second one does not end it;
torchrun kills processes that take too long. Before and after training there are no steps, and a signal raises an
exception instead, so that cleanup runs.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["EndedBySignal", "StopRequest", "signals_raise"]

# Signals that end the process when repeated, and signals that batch systems send before a job's time is up.
_DEMANDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
# If these are ignored at the start, as under nohup, they stay ignored and the run goes on.
_MAY_BE_IGNORED = (signal.SIGHUP, *_WARNINGS)


class EndedBySignal(BaseException):
    """Raised by a signal that is to end the process. signal: the signal."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 raise EndedBySignal once in the block; Ctrl-C is left as it is."""

    def handle(number: int, frame: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        raise EndedBySignal(number)

    handled = [number for number in (*_DEMANDS, *_WARNINGS) if number != signal.SIGINT and _wanted(number)]
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        _restore(previous)


class StopRequest:
    """Context in which SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 set :attr:`signal` instead of ending the process.

    Args:
        again_ends: whether a second signal ends the process at once.
        talk: whether to print a message when a signal arrives.
    """

    def __init__(self, *, again_ends: bool = True, talk: bool = True) -> None:
        self._again_ends = again_ends
        self._talk = talk
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (*_DEMANDS, *_WARNINGS):
            if _wanted(number):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._previous)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 if there was no signal."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, signal.Signals(number)
        if self._again_ends:
            for each in _DEMANDS:
                if each in self._previous:
                    signal.signal(each, signal.SIG_DFL)
        if self._talk and not again:
            hint = "; once more ends at once" if self._again_ends and number in _DEMANDS else ""
            print(f"\n{self.signal.name}: finishing this step and saving{hint}", file=sys.stderr, flush=True)


def _wanted(number: signal.Signals) -> bool:
    # Python allows only the main thread to set signal handlers; a run in another thread does not handle signals.
    if threading.current_thread() is not threading.main_thread():
        return False
    return number not in _MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
