"""Where a run's metrics, config and figures go besides its own files: TensorBoard, Weights & Biases, MLflow.

A logger takes what the run log hands on and may raise whatever its library raises; :class:`RunLog` goes on without one
that fails. Libraries are imported where they are used.
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

# What runs are listed under, where a program lists runs of several projects.
_PROJECT = "cpc_ext"
# The file of a program's folder that tells what the run is called there.
_RUN_ID = "run-id"


class Logger(ABC):
    """One of the places.

    Args:
        run: the run's folder.
        after_step: the step that the run goes on from; 0 for a new one.
    """

    # What is imported, what that needs beside it, what pip installs it by, and what the logger writes, for messages.
    library: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def __init__(self, run: RunDir, *, after_step: int) -> None: ...

    @abstractmethod
    def config(self, config: RunConfig) -> None:
        """What determines the run."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by names such as train/loss."""

    @abstractmethod
    def image(self, step: int, name: str, path: Path) -> None:
        """A PNG file of the run."""

    def flush(self) -> None:  # noqa: B027 - some write at once.
        """Bring what was logged to the disk."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """End. complete: whether the run is, too; else it stopped, or will go on."""


class TensorBoardLogger(Logger):
    """Events in the run's folder ``tensorboard``."""

    library = "torch.utils.tensorboard"
    package = "tensorboard"
    title = "TensorBoard events"

    def __init__(self, run: RunDir, *, after_step: int) -> None:
        # It hides what an earlier process logged from purge_step on.
        self._writer = import_module(self.library).SummaryWriter(
            str(run.tensorboard), purge_step=after_step and after_step + 1
        )
        self._first = after_step

    def config(self, config: RunConfig) -> None:
        # Markdown: what is indented is shown as it is.
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
    """A run of Weights & Biases in the run's folder ``wandb``, for ``wandb sync``; WANDB_MODE=online sends it at once.

    A run that goes on is the same one there.
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
            # The run prints enough by itself.
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
    """A run of MLflow in the run's folder ``mlflow``, or where MLFLOW_TRACKING_URI says.

    A run that goes on is the same one there. MLflow forgets nothing: steps after the checkpoint that a killed run goes
    on from are there twice.
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
            # It takes folders of plain files no more.
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
        if self._new:  # They cannot be changed.
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
    """The logger of this name. It raises whatever its library raises."""
    return _KINDS[name](run, after_step=after_step)


def logger_title(name: str) -> str:
    """What the logger of this name writes, for messages."""
    return _KINDS[name].title


def check_loggers(names: Iterable[str]) -> None:
    """TrainingError where the library of one is missing or broken."""
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
        # What a library raises that fits those beside it badly is anybody's guess.
        raise TrainingError(
            f"--logger {name}: {library} is installed but cannot be imported: {type(error).__name__}: {error}"
        ) from None


def _flat(tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The options of a config's dump, by section and name."""
    for section, values in tree.items():
        if isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            yield section, values


def _identity(run: RunDir, program: str) -> str | None:
    """What the run is called by a program that it was logged to before; None where it was not."""
    try:
        return (run.path / program / _RUN_ID).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _remember(run: RunDir, program: str, identity: str) -> str:
    folder = run.path / program
    folder.mkdir(exist_ok=True)
    write_text(folder / _RUN_ID, identity)
    return identity
