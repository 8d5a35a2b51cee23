"""Training runs: options, loop, checkpoints and logging.

Names are imported on first access, because the command lines need the options but not PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpc_ext.programs.training import main
    from cpc_ext.training.config import RunConfig
    from cpc_ext.training.errors import TrainingError
    from cpc_ext.training.presets import preset
    from cpc_ext.training.task import Task

__all__ = ["RunConfig", "Task", "TrainingError", "main", "preset"]

_MODULES = {
    "RunConfig": "cpc_ext.training.config",
    "Task": "cpc_ext.training.task",
    "TrainingError": "cpc_ext.training.errors",
    # Provided for convenience, although built on the rest of this package.
    "main": "cpc_ext.programs.training",
    "preset": "cpc_ext.training.presets",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name, f"{__name__}.{name}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(found, name) if name in _MODULES else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
