"""The models that can be trained: the packages of cpc_ext.tasks, found by their names.

A package is called as its model is, with "_" for "-" and "_plus" for "+": pixelcnn_plus_plus is pixelcnn++. Its
docstring says what the model is called and where it was published. Its module ``options`` has CONFIG, the class of the
model's configs, and PRESETS, by data set what differs from that class's defaults; its module ``task`` has TASK, how the
model learns. Only the last imports PyTorch.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpc_ext.training.config import Presets, RunConfig
    from cpc_ext.training.task import Task

__all__ = ["MODELS", "config_class", "model_presets", "published", "task_class", "title"]

_PACKAGES = {
    info.name.replace("_plus", "+").replace("_", "-"): f"cpc_ext.tasks.{info.name}"
    for info in pkgutil.iter_modules([str(Path(__file__).parents[1] / "tasks")])
    if info.ispkg
}
MODELS = tuple(_PACKAGES)


def config_class(model: str) -> type[RunConfig]:
    """The class of a model's configs. KeyError for a name that does not exist; so do those below."""
    found: type[RunConfig] = _of(model, "options").CONFIG
    return found


def model_presets(model: str) -> Presets:
    """By data set, what differs from the defaults of a model's configs, by section."""
    found: Presets = _of(model, "options").PRESETS
    return found


def task_class(model: str) -> type[Task]:
    """The class of a model's tasks, which takes a run's config, a data set and a device. It imports PyTorch."""
    found: type[Task] = _of(model, "task").TASK
    return found


def title(model: str) -> str:
    """What a model is called in figures."""
    return _about(model)[0]


def published(model: str) -> str:
    """Where a model was published."""
    return _about(model)[1]


def _about(model: str) -> tuple[str, str]:
    name, _, source = (import_module(_PACKAGES[model]).__doc__ or "").strip().partition(": ")
    return name, source


def _of(model: str, module: str) -> Any:
    return import_module(f"{_PACKAGES[model]}.{module}")
