"""Logged steps to metrics.jsonl and TensorBoard.

A step appears once, also after a run was killed and resumed from an earlier checkpoint: what was logged past the
checkpoint is dropped first. A full disk costs log lines, not the run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cpc_ext.training.errors import warn
from cpc_ext.training.run_dir import RunDir

__all__ = ["RunLog", "read_metrics"]


class RunLog:
    """Writer of a run's metrics.

    after_step: go on from the checkpoint of this step; 0 for a new run.
    """

    def __init__(self, run: RunDir, *, after_step: int = 0) -> None:
        kept = [record for record in read_metrics(run.metrics) if record["step"] <= after_step]
        self._file = open(run.metrics, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._end = 0
        self._failed = False
        for record in kept:
            self._append(record)
        # TensorBoard hides what an earlier process logged from purge_step on.
        self._tensorboard: SummaryWriter | None = SummaryWriter(str(run.tensorboard), purge_step=after_step + 1)

    def log(self, record: dict[str, float | int], *, group: str = "train") -> None:
        """Add one line; record holds "step" and any numbers. group: the scalars' group in TensorBoard."""
        self._append(record)
        if self._tensorboard is not None:
            try:
                for name, value in record.items():
                    if name not in ("step", "epoch"):
                        self._tensorboard.add_scalar(f"{group}/{name}", value, int(record["step"]))
            except Exception as error:
                # Its background thread hands on whatever went wrong when the disk was full.
                self._tensorboard = None
                self._warn("TensorBoard events", error)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add the final results to TensorBoard."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"final/{name}", value, step)

    def sync(self) -> None:
        """Bring what was logged to the disk."""
        try:
            os.fsync(self._file.fileno())
            if self._tensorboard is not None:
                self._tensorboard.flush()
        except OSError as error:
            self._warn("metrics", error)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, record: dict[str, float | int]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, os.strerror(28))
            self._end += len(line)
        except OSError as error:
            # Half a line would swallow the next one.
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._warn("metrics.jsonl", error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            warn(f"could not write {what} ({error}); training goes on without")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged steps of a run; none where there is no file. A last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
