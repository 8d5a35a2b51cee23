"""Decoding of files in threads, for readers that release the GIL, such as Pillow and libsndfile."""

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
    """Yield the decoded files in their order, with a progress bar.

    files: paths or contents; an iterator is consumed as they are decoded.
    ahead: number of files given to the threads at a time; large enough that threads seldom wait for the slowest file.
    what: noun for a file's content in the singular and the plural.
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
        # A `with` statement would first finish all queued files on Ctrl-C.
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
