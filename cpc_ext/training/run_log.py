"""The log of a run: writes each logged step to metrics.jsonl and to the run's loggers, and metrics.csv at the end.

A step appears once even if a run was killed and resumed from an earlier checkpoint: lines after the checkpoint are
dropped first, by an atomic rewrite. A full disk costs log lines, not the run.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cpc_ext.training.atomic_file import atomic_file, write_text
from cpc_ext.training.config import RunConfig
from cpc_ext.training.errors import warn
from cpc_ext.training.loggers import Logger, logger_title, open_logger
from cpc_ext.training.run_dir import RunDir

__all__ = ["RunLog", "read_metrics", "write_table"]


class RunLog:
    """Writer of a run's metrics.

    Args:
        run: the run's folder.
        after_step: the step of the checkpoint that the run is resumed from; 0 for a new run.
        loggers: names of the loggers to use, see :mod:`cpc_ext.training.loggers`. One that fails causes a warning and
            is not used any more.

    Raises:
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, run: RunDir, *, after_step: int = 0, loggers: Iterable[str] = ("tensorboard",)) -> None:
        before = run.metrics.read_bytes() if run.metrics.is_file() else b""
        # A run resumed from step 0 starts over and logs step 0 again, so no line is kept then.
        kept = b"".join(line + b"\n" for record, line in _records(before) if record["step"] <= after_step > 0)
        if kept != before:
            # Not in place: a kill between truncating and rewriting the file would lose all steps so far.
            with atomic_file(run.metrics) as file:
                file.write(kept)
        self._run = run
        self._file = open(run.metrics, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._end = len(kept)
        self._failed: set[str] = set()
        self._complete = False
        self._loggers: dict[str, Logger] = {}
        for name in loggers:
            with self._without(name):
                self._loggers[name] = open_logger(name, run, after_step=after_step)

    def config(self, config: RunConfig) -> None:
        """Pass the run's config to the loggers."""
        self._tell(lambda logger: logger.config(config))

    def log(self, record: dict[str, float | int], *, group: str = "train") -> None:
        """Log one record, which holds "step" and any numbers; loggers name its scalars "group/name"."""
        self._append(record)
        values = {f"{group}/{name}": value for name, value in record.items() if name not in ("step", "epoch")}
        self._tell(lambda logger: logger.scalars(int(record["step"]), values))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Pass the final results to the loggers, which marks the run as complete."""
        self._complete = True
        named = {f"final/{name}": value for name, value in values.items()}
        self._tell(lambda logger: logger.scalars(step, named))

    def images(self, step: int, paths: Iterable[Path]) -> None:
        """Pass PNG files in the run's folder to the loggers; samples of all steps share one name."""
        for path in paths:
            inside = path.relative_to(self._run.path)
            name = "samples/on_the_way" if inside.parent.name else f"figures/{inside.stem}"
            self._tell(lambda logger, name=name, path=path: logger.image(step, name, path))  # type: ignore[misc]

    def sync(self) -> None:
        """Sync metrics.jsonl to disk and flush the loggers."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn("metrics.jsonl", error)
        self._tell(lambda logger: logger.flush())

    def close(self) -> None:
        """Close the log and the loggers, and write metrics.csv with all steps, including those before a resume."""
        self._file.close()
        try:
            write_table(read_metrics(self._run.metrics), self._run.table)
        except OSError as error:
            self._warn("metrics.csv", error)
        self._tell(lambda logger: logger.close(complete=self._complete))

    def _append(self, record: dict[str, float | int]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end += len(line)
        except OSError as error:
            # Remove a partial line, to which the next record would otherwise be appended.
            with suppress(OSError):
                self._file.truncate(self._end)
            self._warn("metrics.jsonl", error)

    def _tell(self, what: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            with self._without(name):
                what(logger)

    @contextmanager
    def _without(self, name: str) -> Iterator[None]:
        """Drop the logger with a warning if the block raises."""
        try:
            yield
        except Exception as error:
            # Any exception: TensorBoard's background thread re-raises whatever failed when the disk was full.
            self._loggers.pop(name, None)
            self._warn(logger_title(name), error)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            warn(f"could not write {what} ({error}); training goes on without")


def read_metrics(path: Path, having: Collection[str] = ()) -> list[dict[str, float]]:
    """Return the logged records of a run; an empty list if there is no file.

    Lines that are not records ("step" and numbers by name) are skipped: a kill may have cut the last one short, and a
    power loss or another program may have damaged others.

    Args:
        path: metrics.jsonl.
        having: names that a record must contain to be returned.
    """
    if not path.is_file():
        return []
    return [record for record, _ in _records(path.read_bytes()) if all(name in record for name in having)]


def write_table(records: Sequence[dict[str, float]], path: Path) -> None:
    """Write records as CSV with one row per step and one column per name; missing values are empty.

    Raises OSError if writing fails.
    """
    rows: dict[float, dict[str, float]] = {}
    for record in records:
        rows.setdefault(record["step"], {}).update(record)
    names = list(dict.fromkeys(name for record in records for name in record)) or ["step"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_text(path, text.getvalue())


def _records(content: bytes) -> Iterator[tuple[dict[str, float], bytes]]:
    """Yield the records in the content of metrics.jsonl, each with its line."""
    for line in content.split(b"\n"):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            yield record, line


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] < 0:
        return False
    # Reject integers of more than 64 bits, which JSON allows, and booleans, which are integers in Python.
    return all(
        isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
        for value in record.values()
    )
