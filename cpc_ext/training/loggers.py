"""Loggers that take a run's metrics, config and figures besides its own files: TensorBoard, Weights & Biases, MLflow.

:class:`RunLog` calls the loggers. A logger may raise whatever its library raises; RunLog then goes on without it. Each
library is imported only where it is used.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from cpc_ext.training.atomic_file import write_text
from cpc_ext.training.config import RunConfig
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir

__all__ = ["Logger", "check_loggers", "logger_title", "open_logger"]

# Project or experiment name under which Weights & Biases and MLflow list the runs.
_PROJECT = "cpc_ext"
# File in a logger's folder that holds the logger's ID of the run.
_RUN_ID = "run-id"


class Logger(ABC):
    """Base class of the loggers.

    Args:
        run: the run's folder.
        after_step: the step that the run is resumed from; 0 for a new run.
    """

    # The module to import, further modules that it needs, the name for pip, and what the logger writes, for messages.
    library: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def __init__(self, run: RunDir, *, after_step: int) -> None: ...

    @abstractmethod
    def config(self, config: RunConfig) -> None:
        """Log the run's config."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the scalars of a step, by names such as train/loss."""

    @abstractmethod
    def image(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file of the run."""

    def flush(self) -> None:  # noqa: B027 - some write at once.
        """Write buffered entries to disk."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """Close the logger. complete: True if the run is complete, False if it stopped and may be resumed."""


class TensorBoardLogger(Logger):
    """Writes TensorBoard events into the run's folder ``tensorboard``."""

    library = "torch.utils.tensorboard"
    package = "tensorboard"
    title = "TensorBoard events"

    def __init__(self, run: RunDir, *, after_step: int) -> None:
        # TensorBoard hides what an earlier process logged from purge_step on.
        self._writer = import_module(self.library).SummaryWriter(
            str(run.tensorboard), purge_step=after_step and after_step + 1
        )
        self._first = after_step

    def config(self, config: RunConfig) -> None:
        # TensorBoard renders Markdown, which shows indented lines verbatim.
        text = "\n".join(f"    {line}" for line in config.to_yaml().splitlines())
        self._writer.add_text("config", text, self._first)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """Writes a run of Weights & Biases into the run's folder ``wandb``.

    ``wandb sync`` uploads it; WANDB_MODE=online does so at once. A resumed run keeps its ID there.
    """

    library = "wandb"
    package = "'cpc_ext[wandb]'"
    title = "to Weights & Biases"

    def __init__(self, run: RunDir, *, after_step: int) -> None:
        self._wandb = import_module(self.library)
        mode = os.environ.get("WANDB_MODE", "offline")
        identity = _identity(run, self.library) if after_step else None
        more = {"resume": "allow"} if mode == "online" else {}
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.path.resolve().name,
            id=identity or _remember(run, self.library, secrets.token_hex(4)),
            dir=str(run.path),
            mode=mode,
            # The training program has its own output.
            settings=self._wandb.Settings(console="off", silent=True),
            **more,
        )

    def config(self, config: RunConfig) -> None:
        self._run.config.update(config.model_dump(mode="json"), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class MLflowLogger(Logger):
    """Writes a run of MLflow into the run's folder ``mlflow``, or to MLFLOW_TRACKING_URI.

    A resumed run keeps its ID there. MLflow keeps every logged step: after a run is killed and resumed, the steps after
    its checkpoint appear twice.
    """

    library = "mlflow"
    needs = ("sqlalchemy", "alembic")  # The small mlflow-skinny comes without them.
    package = "'cpc_ext[mlflow]'"
    title = "to MLflow"

    def __init__(self, run: RunDir, *, after_step: int) -> None:
        self._mlflow = import_module(self.library)
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if place is None:
            run.mlflow.mkdir(exist_ok=True)
            # MLflow no longer supports tracking in plain files.
            place = f"sqlite:///{(run.mlflow / 'mlflow.db').resolve()}"
        self._client = self._mlflow.MlflowClient(tracking_uri=place)
        identity = _identity(run, self.library) if after_step else None
        self._new = identity is None
        if identity is None:
            found = self._client.get_experiment_by_name(_PROJECT)
            experiment = found.experiment_id if found else self._make_experiment(run)
            made = self._client.create_run(experiment, run_name=run.path.resolve().name)
            identity = _remember(run, self.library, made.info.run_id)
        else:
            self._client.update_run(identity, status="RUNNING")
        self._id = identity

    def config(self, config: RunConfig) -> None:
        entities = self._mlflow.entities
        if self._new:  # MLflow's parameters cannot be changed later.
            tree = config.model_dump(mode="json")
            values = [entities.Param(name, json.dumps(value)) for name, value in _flat(tree)]
            self._client.log_batch(self._id, params=values)
        self._client.log_text(self._id, config.to_yaml(), "config.yaml")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), name.partition("/")[0])

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")

    def _make_experiment(self, run: RunDir) -> str:
        local = "MLFLOW_TRACKING_URI" not in os.environ
        artifacts = (run.mlflow / "artifacts").resolve().as_uri() if local else None
        made: str = self._client.create_experiment(_PROJECT, artifact_location=artifacts)
        return made


_KINDS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


def open_logger(name: str, run: RunDir, *, after_step: int) -> Logger:
    """Open the logger of this name. Raises whatever its library raises."""
    return _KINDS[name](run, after_step=after_step)


def logger_title(name: str) -> str:
    """Return what the logger of this name writes, for messages."""
    return _KINDS[name].title


def check_loggers(names: Iterable[str]) -> None:
    """Raise TrainingError if a logger's library is missing or cannot be imported."""
    for name in names:
        for library in (_KINDS[name].library, *_KINDS[name].needs):
            _check(name, library)


def _check(name: str, library: str) -> None:
    try:
        import_module(library)
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"--logger {name} needs a library that is not installed ({error}): pip install {_KINDS[name].package}"
        ) from None
    except Exception as error:
        # A library that does not fit the versions of its dependencies may raise anything.
        raise TrainingError(
            f"--logger {name}: {library} is installed but cannot be imported: {type(error).__name__}: {error}"
        ) from None


def _flat(tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the options of a config's dump as pairs of "section.name" and value."""
    for section, values in tree.items():
        if isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            yield section, values


def _identity(run: RunDir, program: str) -> str | None:
    """Return the ID that a logger gave the run earlier, or None if the run was not logged there."""
    try:
        return (run.path / program / _RUN_ID).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _remember(run: RunDir, program: str, identity: str) -> str:
    folder = run.path / program
    folder.mkdir(exist_ok=True)
    write_text(folder / _RUN_ID, identity)
    return identity
