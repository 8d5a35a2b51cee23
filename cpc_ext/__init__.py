"""Contrastive predictive coding for PyTorch, with its hot paths in C++ and CUDA.

Importing the package imports no subpackage and not PyTorch: both are imported when an attribute is first accessed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpc_ext._version import __version__
from cpc_ext.build_info import build_info

if TYPE_CHECKING:
    from cpc_ext import data, interop, models, nn, ops, training
    from cpc_ext.programs.fit import fit

__all__ = ["__version__", "build_info", "data", "fit", "interop", "models", "nn", "ops", "training"]


def __getattr__(name: str) -> Any:
    if name == "fit":
        return importlib.import_module(f"{__name__}.programs.fit").fit
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
