"""The benchmarked ops: every module here exports its entries as ``OPS``, and ``all_ops`` finds them."""

from __future__ import annotations

import importlib
import pkgutil

from benchmark import Op

__all__ = ["all_ops", "counted_ops"]


def all_ops() -> dict[str, Op]:
    """Return every op by its name, with modules in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    entries = [entry for name in names for entry in importlib.import_module(f"{__name__}.{name}").OPS]
    return {entry.name: entry for entry in entries}


def counted_ops() -> dict[str, Op]:
    """Return the ops for which the emulation counts most of the work on CUDA."""
    return {name: op for name, op in all_ops().items() if op.counted}
