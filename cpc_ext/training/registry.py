"""The models that can be trained: the packages of cpc_ext.tasks, found by their names.

The docstring of a package says what the model is called and where it was published. Its module ``options`` has CONFIG,
the class of the model's configs, PRESETS, by data set what differs from that class's defaults, and where the model was
published with several settings RECIPES, by their names what differs again; its module ``task`` has TASK, how the model
learns. Only the last imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpc_ext._found import found_in
from cpc_ext.data_sets import medium

if TYPE_CHECKING:
    from cpc_ext.training.config import Preset, Presets, RunConfig
    from cpc_ext.training.task import Task

__all__ = [
    "MODELS",
    "config_class",
    "model_medium",
    "model_presets",
    "model_recipes",
    "published",
    "task_class",
    "title",
]

_PACKAGES = found_in("cpc_ext.tasks", packages=True)
MODELS = tuple(_PACKAGES)


def config_class(model: str) -> type[RunConfig]:
    """The class of a model's configs. KeyError for a name that does not exist; so do those below."""
    found: type[RunConfig] = _of(model, "options").CONFIG
    return found


def model_presets(model: str) -> Presets:
    """By data set, what differs from the defaults of a model's configs, by section."""
    found: Presets = _of(model, "options").PRESETS
    return found


def model_recipes(model: str) -> Mapping[str, Preset]:
    """By recipe, what differs from the defaults of a model's configs, by section; most models have none."""
    found: Mapping[str, Preset] = getattr(_of(model, "options"), "RECIPES", {})
    return found


def model_medium(model: str) -> str:
    """What a model learns from: the medium of the data sets that it has presets for."""
    return medium(next(iter(model_presets(model))))


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
