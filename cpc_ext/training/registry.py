"""Registry of the models that can be trained: the packages of cpc_ext.tasks.

The docstring of a package has the form "Title: where the model was published." Its module ``options`` defines CONFIG,
the class of the model's configs; PRESETS, by data set the values that differ from that class's defaults; and, for a
model that was published with several settings, RECIPES, the same by recipe. Its module ``task`` defines TASK, the class
of the model's tasks. Only ``task`` imports PyTorch.
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
    """Return the class of a model's configs. Like the functions below, raises KeyError if there is no such model."""
    found: type[RunConfig] = _of(model, "options").CONFIG
    return found


def model_presets(model: str) -> Presets:
    """Return, by data set, the values that differ from the defaults of the model's config, by section."""
    found: Presets = _of(model, "options").PRESETS
    return found


def model_recipes(model: str) -> Mapping[str, Preset]:
    """Return, by recipe, the values that differ from the config's defaults, by section; most models have none."""
    found: Mapping[str, Preset] = getattr(_of(model, "options"), "RECIPES", {})
    return found


def model_medium(model: str) -> str:
    """Return the medium that a model learns from, which is that of the data sets that it has presets for."""
    return medium(next(iter(model_presets(model))))


def task_class(model: str) -> type[Task]:
    """Return the class of a model's tasks, which takes a run's config, a data set and a device; imports PyTorch."""
    found: type[Task] = _of(model, "task").TASK
    return found


def title(model: str) -> str:
    """Return the name of a model in figures."""
    return _about(model)[0]


def published(model: str) -> str:
    """Return where a model was published."""
    return _about(model)[1]


def _about(model: str) -> tuple[str, str]:
    name, _, source = (import_module(_PACKAGES[model]).__doc__ or "").strip().partition(": ")
    return name, source


def _of(model: str, module: str) -> Any:
    return import_module(f"{_PACKAGES[model]}.{module}")
