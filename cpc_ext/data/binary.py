"""Files of fixed-size binary records, memory-mapped after a check that every record is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def open_records(path: Path, count: int, record_bytes: int) -> np.ndarray:
    """Map a file of `count` records read-only: uint8 [count, record_bytes].

    Raises FileNotFoundError if it is missing, ValueError if its size differs.
    """
    size = require_file(path).stat().st_size
    if size != count * record_bytes:
        raise ValueError(
            f"{path}: expected {count} records of {record_bytes} bytes, {count * record_bytes} bytes in all, "
            f"found {size} bytes; remove {path.parent} and fetch it again with --download"
        )
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(count, record_bytes))


def read_names(path: Path, count: int) -> tuple[str, ...]:
    """Read `count` class names from a text file, one on each line. Raises ValueError if it has more or fewer."""
    try:
        names = tuple(require_file(path).read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {count} class names, found no text: {error}") from None
    if len(names) != count:
        raise ValueError(f"{path}: expected {count} class names, found {len(names)}")
    return names


def require_labels(path: Path, labels: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return labels stored as first..first+count-1 as int64 from 0. Raises ValueError if one lies outside."""
    if len(labels) and not (first <= labels.min() and labels.max() < first + count):
        raise ValueError(f"{path}: expected labels {first}..{first + count - 1}, found {labels.min()}..{labels.max()}")
    return labels.astype(np.int64) - first


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: remove {path.parent} and fetch it again with --download, or name another --data-dir"
        )
    return path
