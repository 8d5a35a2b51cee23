"""The folder of a run: which files it holds, and whether it can take them before hours are spent on filling it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import TrainingError

__all__ = ["RunDir"]

_DEFAULT_PARENT = Path("runs")
# Metrics, TensorBoard events and figures of a long run, and room for the file system's own bookkeeping.
_OTHER_FILES_BYTES = 32 * 2**20


class RunDir:
    """A run's folder, held by one process at a time.

    Attributes:
        path: the folder.
        config, metrics, checkpoint, best, diverged, encoder, model, samples, summary, tensorboard: what lies in it,
            of which encoder, model and samples depend on what is trained.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.best = path / "best.pt"
        self.diverged = path / "diverged.pt"
        self.encoder = path / "encoder.safetensors"
        self.model = path / "model.safetensors"
        self.samples = path / "samples"
        self.summary = path / "summary.json"
        self.tensorboard = path / "tensorboard"
        self._lock = FileLock(path / ".lock")

    @classmethod
    def create(cls, path: Path | None, *, model: str, dataset: str) -> RunDir:
        """A folder for a new run, by default the first free runs/MODEL-DATASET-NUMBER.

        Raises TrainingError where it cannot be written to or already holds a run.
        """
        try:
            if path is None:
                path = _next_numbered(_DEFAULT_PARENT, f"{model}-{dataset}")
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run._hold()
        except OSError as error:
            raise TrainingError(f"--out-dir: cannot write to {path or _DEFAULT_PARENT}: {error.strerror}") from None
        if run.config.exists() or run.checkpoint.exists():
            raise TrainingError(
                f"--out-dir: {path} already holds a run; give --resume to go on with it, or another --out-dir"
            )
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        """The folder of a run to resume. TrainingError where there is none or it cannot be written to."""
        run = cls(path)
        if not run.checkpoint.is_file():
            raise TrainingError(f"--resume: there is no checkpoint at {run.checkpoint}; without --resume a run starts")
        try:
            run._hold()
        except OSError as error:
            raise TrainingError(f"--out-dir: cannot write to {path}: {error.strerror}") from None
        return run

    def check_space(self, checkpoint_bytes: int) -> None:
        """TrainingError where the disk has no room for the run's files.

        Besides the last and the best checkpoint there is, while one is written, a third.
        """
        needed = 3 * checkpoint_bytes + _OTHER_FILES_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise TrainingError(
                f"--out-dir: {self.path} has {free / 2**20:.0f} MiB left, the run needs about {needed / 2**20:.0f} MiB "
                "for its checkpoints; free some or choose another --out-dir"
            )

    def release(self) -> None:
        """Let other processes resume the run. The folder of a run that never wrote anything is removed."""
        self._lock.release()
        if {file.name for file in self.path.iterdir()} <= {".lock"}:
            with suppress(OSError):
                (self.path / ".lock").unlink(missing_ok=True)
                self.path.rmdir()

    def _hold(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(f"--out-dir: another process is training in {self.path}") from None
        # Being allowed to create a file and having room for its content are two things.
        probe = self.path / ".probe"
        with atomic_file(probe) as file:
            file.write(b"\0" * 4096)
        probe.unlink()


def _next_numbered(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{stem}-{number:03d}"
        try:
            path.mkdir()  # Creating it, not looking for it, is what claims a number among several processes.
            return path
        except FileExistsError:
            number += 1
