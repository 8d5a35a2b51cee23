"""Work on files by threads, for readers that let go of the interpreter meanwhile, such as Pillow and libsndfile."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

_Encoded = TypeVar("_Encoded")
_Decoded = TypeVar("_Decoded")


def in_order(
    decode: Callable[[_Encoded], _Decoded], files: Iterable[_Encoded], *, ahead: int, what: tuple[str, str]
) -> Generator[_Decoded, None, None]:
    """What becomes of files, in their order, under a progress bar.

    files: their paths or contents; taken from an iterator as they are decoded.
    ahead: files that are decoded before the first of them is taken; enough that threads seldom wait for the slowest.
    what: one file's content is called, and several are.
    """
    pool = ThreadPoolExecutor(cores())
    try:
        total = len(files) if isinstance(files, Sized) else None
        with tqdm(desc=f"decoding {what[1]}", total=total, unit=what[0], disable=None) as bar:
            left = iter(files)
            while batch := list(islice(left, ahead)):
                for decoded in pool.map(decode, batch):
                    bar.update()
                    yield decoded
    finally:
        # Not `with`: on Ctrl-C that would first finish what is queued.
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
