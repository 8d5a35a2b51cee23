"""Logged steps to metrics.jsonl and TensorBoard.

A step appears once, also after a run was killed and resumed from an earlier checkpoint: what was logged past the
checkpoint is dropped first, without the rest being in danger. A full disk costs log lines, not the run.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import warn
from cpc_ext.training.run_dir import RunDir

__all__ = ["RunLog", "read_metrics"]


class RunLog:
    """Writer of a run's metrics.

    after_step: go on from the checkpoint of this step; 0 for a new run.

    Raises OSError where metrics.jsonl cannot be written.
    """

    def __init__(self, run: RunDir, *, after_step: int = 0) -> None:
        before = run.metrics.read_bytes() if run.metrics.is_file() else b""
        # Step 0 is of a run that begins, and one that goes on from there begins again.
        kept = b"".join(line + b"\n" for record, line in _records(before) if record["step"] <= after_step > 0)
        if kept != before:
            # Not in place: a kill between emptying and filling it would take all steps so far.
            with atomic_file(run.metrics) as file:
                file.write(kept)
        self._file = open(run.metrics, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._end = len(kept)
        self._failed = False
        self._tensorboard: SummaryWriter | None = None
        with self._without_tensorboard():
            # TensorBoard hides what an earlier process logged from purge_step on.
            self._tensorboard = SummaryWriter(str(run.tensorboard), purge_step=after_step and after_step + 1)

    def log(self, record: dict[str, float | int], *, group: str = "train") -> None:
        """Add one line; record holds "step" and any numbers. group: the scalars' group in TensorBoard."""
        self._append(record)
        values = {name: value for name, value in record.items() if name not in ("step", "epoch")}
        self._add_scalars(group, int(record["step"]), values)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add the final results to TensorBoard."""
        self._add_scalars("final", step, values)

    def sync(self) -> None:
        """Bring what was logged to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn("metrics.jsonl", error)
        with self._without_tensorboard():
            if self._tensorboard is not None:
                self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        with self._without_tensorboard():
            if self._tensorboard is not None:
                self._tensorboard.close()

    def _append(self, record: dict[str, float | int]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end += len(line)
        except OSError as error:
            # Half a line would swallow the next one.
            with suppress(OSError):
                self._file.truncate(self._end)
            self._warn("metrics.jsonl", error)

    def _add_scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        with self._without_tensorboard():
            if self._tensorboard is not None:
                for name, value in values.items():
                    self._tensorboard.add_scalar(f"{group}/{name}", value, step)

    @contextmanager
    def _without_tensorboard(self) -> Iterator[None]:
        """Go on without TensorBoard where the block fails."""
        try:
            yield
        except Exception as error:
            # Its background thread hands on whatever went wrong when the disk was full.
            self._tensorboard = None
            self._warn("TensorBoard events", error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            warn(f"could not write {what} ({error}); training goes on without")


def read_metrics(path: Path, having: Collection[str] = ()) -> list[dict[str, float]]:
    """The logged steps of a run; none where there is no file.

    having: names that a record must have to be among them.

    Lines that are no record, "step" and numbers by name, are left out: the last one, cut short by a kill, or what a
    power loss or another program made of them.
    """
    if not path.is_file():
        return []
    return [record for record, _ in _records(path.read_bytes()) if all(name in record for name in having)]


def _records(content: bytes) -> Iterator[tuple[dict[str, float], bytes]]:
    """The records of metrics.jsonl, each with its line."""
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
    # JSON has numbers that are no 64-bit ones, and truth values are integers to Python.
    return all(
        isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
        for value in record.values()
    )
