"""Ctrl-C, SIGTERM and their like as a request: the loop looks at it between steps, saves, and leaves.

The first signal only takes a note and puts the system's own handling back, so that a second one ends the process at
once, whatever it is doing; a scheduler's warning may be repeated. Of several processes that torchrun watches over, each
may get the same request twice, from the terminal and from torchrun, which ends by itself those that take too long.
Where there are no steps, before and after training, a signal is an exception, so that what was begun is put away.
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

# What ends the process when it is repeated, and what batch systems send ahead of the end of a job's time.
_DEMANDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
# Whoever starts a run so that these are ignored, as nohup does, wants it to go on.
_MAY_BE_IGNORED = (signal.SIGHUP, *_WARNINGS)


class EndedBySignal(BaseException):
    """A signal that is to end the process. signal: which one."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


@contextmanager
def signals_raise() -> Iterator[None]:
    """In the block, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 raise EndedBySignal, once; Ctrl-C remains what it is."""

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

    again_ends: a second signal ends the process. talk: say what is going on.
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
        """128 + the signal's number, as shells report it; 0 without a request."""
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
    # Python lets its main thread alone handle signals; a run in another one leaves them to that.
    if threading.current_thread() is not threading.main_thread():
        return False
    return number not in _MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
