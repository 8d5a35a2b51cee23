"""Work on files by threads, for readers that let go of the interpreter meanwhile, such as Pillow and libsndfile."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

_Decoded = TypeVar("_Decoded")


def in_order(
    decode: Callable[[Path], _Decoded], files: Sequence[Path], *, ahead: int, what: tuple[str, str]
) -> Generator[_Decoded, None, None]:
    """What becomes of files, in their order, under a progress bar.

    ahead: files that are decoded before the first of them is taken; enough that threads seldom wait for the slowest.
    what: one file's content is called, and several are.
    """
    pool = ThreadPoolExecutor(cores())
    try:
        with tqdm(desc=f"decoding {what[1]}", total=len(files), unit=what[0], disable=None) as bar:
            for start in range(0, len(files), ahead):
                for decoded in pool.map(decode, files[start : start + ahead]):
                    bar.update()
                    yield decoded
    finally:
        # Not `with`: on Ctrl-C that would first finish what is queued.
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
