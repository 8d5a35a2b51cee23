"""The folder of a run: its files, its lock, and checks before training that the files can be written."""

from __future__ import annotations

import errno
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.config import RunConfig, load_config
from cpc_ext.training.errors import TrainingError, warn, writing
from cpc_ext.training.registry import model_medium

__all__ = ["RunDir"]

_DEFAULT_PARENT = Path("runs")
# Space for metrics, TensorBoard events and figures of a long run, and for the file system's own metadata.
_OTHER_FILES_BYTES = 32 * 2**20


class RunDir:
    """A run's folder, which one process at a time holds by a lock.

    Attributes:
        path: the folder.
        config, metrics, table, checkpoint, best, diverged, encoder, model, samples, summary, tensorboard, wandb,
            mlflow: paths in it. Whether encoder, model and samples exist depends on the model; the last three depend on
            the loggers.
        resuming: the command, or the Python call, that resumes the run, for messages.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.table = path / "metrics.csv"
        self.checkpoint = path / "checkpoint.pt"
        self.best = path / "best.pt"
        self.diverged = path / "diverged.pt"
        self.encoder = path / "encoder.safetensors"
        self.model = path / "model.safetensors"
        self.samples = path / "samples"
        self.summary = path / "summary.json"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.mlflow = path / "mlflow"
        self.resuming = f"python -m cpc_ext.train --resume --out-dir {shlex.quote(str(path))}"
        self._lock = FileLock(path / ".lock")

    @classmethod
    def create(cls, path: Path | None, *, model: str, dataset: str, option_name: str = "--out-dir") -> RunDir:
        """Create the folder of a new run and lock it.

        Args:
            path: the folder; None for the first free runs/MODEL-DATASET-NUMBER.
            model: name of the model.
            dataset: name of the data set.
            option_name: the option that names the folder, for messages.

        Raises:
            TrainingError: the folder cannot be written to, or already holds a run, see :attr:`begun`.
        """
        with writing(path or _DEFAULT_PARENT, option_name):
            if path is None:
                path = _next_numbered(_DEFAULT_PARENT, f"{model}-{dataset}")
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run._hold()
        if run.begun:
            run.release()
            go_on = "" if option_name != "--out-dir" else "give --resume to go on with it, or "
            raise TrainingError(f"{option_name}: {path} already holds a run; {go_on}another {option_name}")
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        """Lock the folder of a run to resume. Raises TrainingError if there is no run or it cannot be written to."""
        run = cls(path)
        run.check_resumable()
        with writing(path, "--out-dir"):
            run._hold()
        return run

    @property
    def known_config(self) -> RunConfig:
        """The run's config. Raises TrainingError if the folder is not a run's."""
        if not self.config.is_file():
            raise TrainingError(f"{self.path} is not a run's folder: there is no {self.config.name}")
        return load_config(self.config)

    @property
    def medium(self) -> str:
        """The medium of the run's model, "images" or "audio".

        A folder that is not a run's also gives "images"; opening it fails elsewhere.
        """
        return model_medium(self.known_config.model) if self.config.is_file() else "images"

    @property
    def begun(self) -> bool:
        """True if the folder holds a run that a new one would destroy.

        A run that ended before its first checkpoint does not count; it leaves only its config, as we write it.
        """
        made = (self.checkpoint, self.best, self.diverged, self.encoder, self.model, self.summary)
        if any(path.exists() for path in made) or (self.metrics.exists() and self.metrics.stat().st_size > 0):
            return True
        return self.config.exists() and not self._config_is_ours()

    def sample(self, step: int) -> Path:
        """Return the path of the samples drawn by the model at a step, if it draws any."""
        return self.samples / f"step-{step:06d}.png"

    def check_resumable(self) -> None:
        """Raise TrainingError without a checkpoint, unless a run ended before its first and left only its config."""
        if self.checkpoint.is_file() or (self.config.is_file() and not self.begun):
            return
        other = f"; {self.best} is there: copy it to {self.checkpoint.name}" if self.best.is_file() else ""
        raise TrainingError(
            f"--resume: there is no checkpoint at {self.checkpoint}{other or '; without --resume a run starts'}"
        )

    def _config_is_ours(self) -> bool:
        try:
            return load_config(self.config).to_yaml() == self.config.read_text(encoding="utf-8")
        except (OSError, ValueError, TrainingError):
            return False

    def check_space(self, checkpoint_bytes: int) -> None:
        """Raise TrainingError if the disk has no room for the run's files.

        Besides the last and the best checkpoint there is a third while one is written. The space of existing
        checkpoints is counted as available.
        """
        with writing(self.path, "--out-dir"):
            free = shutil.disk_usage(self.path).free
            found = [path.stat() for path in (self.checkpoint, self.best) if path.is_file()]
        there = sum({status.st_ino: status.st_size for status in found}.values())  # One file may have both names.
        needed = max(3 * checkpoint_bytes - there, 0) + _OTHER_FILES_BYTES
        if free < needed:
            raise TrainingError(
                f"--out-dir: {self.path} has {free / 2**20:.0f} MiB left, the run needs about {needed / 2**20:.0f} MiB "
                "for its checkpoints; free some or choose another --out-dir"
            )

    def release(self) -> None:
        """Unlock the folder, so that other processes can resume the run; remove it if the run wrote nothing."""
        # Remove it while the lock is held, so that no other process owns it. It may be gone already.
        with suppress(OSError):
            if {file.name for file in self.path.iterdir()} <= {".lock"}:
                (self.path / ".lock").unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.release()

    def _hold(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(f"--out-dir: another process is training in {self.path}") from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
            warn(f"{self.path} cannot be locked ({error}): see to it that no other process trains there")
        # Write some content: a full disk may still allow an empty file to be created.
        probe = self.path / ".probe"
        try:
            with atomic_file(probe) as file:
                file.write(b"\0" * 4096)
            probe.unlink()
        except OSError:
            self._lock.release()
            raise


def _next_numbered(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{stem}-{number:03d}"
        try:
            path.mkdir()  # Creating the folder claims its number atomically; checking for existence would not.
            return path
        except FileExistsError:
            number += 1
