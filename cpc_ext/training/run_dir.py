"""The folder of a run: which files it holds, and whether it can take them before hours are spent on filling it."""

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
# Metrics, TensorBoard events and figures of a long run, and room for the file system's own bookkeeping.
_OTHER_FILES_BYTES = 32 * 2**20


class RunDir:
    """A run's folder, held by one process at a time.

    Attributes:
        path: the folder.
        config, metrics, table, checkpoint, best, diverged, encoder, model, samples, summary, tensorboard, wandb,
            mlflow: what lies in it, of which encoder, model and samples depend on what is trained, and the last three
            on the loggers.
        resuming: what goes on with the run, for messages: a command, or from Python a call.
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
        """A folder for a new run, by default the first free runs/MODEL-DATASET-NUMBER.

        option_name: the option that asks for it, for messages.

        Raises TrainingError where it cannot be written to, or holds a run that a new one would destroy, see
        :attr:`begun`.
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
        """The folder of a run to resume. TrainingError where there is none or it cannot be written to."""
        run = cls(path)
        run.check_resumable()
        with writing(path, "--out-dir"):
            run._hold()
        return run

    @property
    def known_config(self) -> RunConfig:
        """The run's config. TrainingError where the folder is none of a run's."""
        if not self.config.is_file():
            raise TrainingError(f"{self.path} is not a run's folder: there is no {self.config.name}")
        return load_config(self.config)

    @property
    def medium(self) -> str:
        """What the run's model learns from, "images" or "audio".

        "images" also of a folder that is none of a run's, which whoever opens it refuses.
        """
        return model_medium(self.known_config.model) if self.config.is_file() else "images"

    @property
    def begun(self) -> bool:
        """Whether there is a run that a new one would destroy.

        One that ended before its first checkpoint is none: its config, as we write it, is all that it leaves.
        """
        made = (self.checkpoint, self.best, self.diverged, self.encoder, self.model, self.summary)
        if any(path.exists() for path in made) or (self.metrics.exists() and self.metrics.stat().st_size > 0):
            return True
        return self.config.exists() and not self._config_is_ours()

    def sample(self, step: int) -> Path:
        """Where the picture of what the model draws at a step is, if it draws any."""
        return self.samples / f"step-{step:06d}.png"

    def check_resumable(self) -> None:
        """TrainingError where there is neither a checkpoint nor the config of a run that ended before its first."""
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
        """TrainingError where the disk has no room for the run's files.

        Besides the last and the best checkpoint there is, while one is written, a third. Those that are there already
        have their room.
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
        """Let other processes resume the run. The folder of a run that never wrote anything is removed."""
        # While it is still held, so that it is no other's. The folder may be gone, if someone removed it.
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
        # Being allowed to create a file and having room for its content are two things.
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
            path.mkdir()  # Creating it, not looking for it, is what claims a number among several processes.
            return path
        except FileExistsError:
            number += 1
