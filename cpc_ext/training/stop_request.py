"""Ctrl-C and SIGTERM as a request: the loop looks at it between steps, saves, and leaves.

The first signal only takes a note and puts the system's own handling back, so that a second one ends the process at
once, whatever it is doing. Of several processes that torchrun watches over, each may get the same request twice, from
the terminal and from torchrun, which ends by itself those that take too long.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which SIGINT and SIGTERM set :attr:`signal` instead of ending the process.

    again_ends: a second signal ends the process. talk: say what is going on.
    """

    def __init__(self, *, again_ends: bool = True, talk: bool = True) -> None:
        self._again_ends = again_ends
        self._talk = talk
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
        if self._again_ends:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if self._talk:
            hint = "; once more ends at once" if self._again_ends else ""
            print(f"\n{self.signal.name}: finishing this step and saving{hint}", file=sys.stderr, flush=True)
