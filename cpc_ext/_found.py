"""Modules that are found by their names: what there is of a kind, without importing it."""

from __future__ import annotations

import pkgutil
from pathlib import Path

__all__ = ["found_in"]


def found_in(package: str, *, packages: bool = False) -> dict[str, str]:
    """The modules in a package, or the packages in it, by the names of what is in them.

    A module is called as that is, with "_" for "-" and "_plus" for "+": pixelcnn_plus_plus has pixelcnn++. Nothing is
    found where there is no such package.
    """
    folder = Path(__file__).parents[1].joinpath(*package.split("."))
    names = [info.name for info in pkgutil.iter_modules([str(folder)]) if info.ispkg == packages]
    return {name.replace("_plus", "+").replace("_", "-"): f"{package}.{name}" for name in names}
