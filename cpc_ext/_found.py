"""Discovery of modules by name, without importing them."""

from __future__ import annotations

import pkgutil
from pathlib import Path

__all__ = ["found_in"]


def found_in(package: str, *, packages: bool = False) -> dict[str, str]:
    """Return the modules of a package, or its subpackages, by the name of what each defines.

    A module's name is that name with "_" for "-" and "_plus" for "+": pixelcnn_plus_plus defines pixelcnn++. The result
    is empty where there is no such package.
    """
    folder = Path(__file__).parents[1].joinpath(*package.split("."))
    names = [info.name for info in pkgutil.iter_modules([str(folder)]) if info.ispkg == packages]
    return {name.replace("_plus", "+").replace("_", "-"): f"{package}.{name}" for name in names}
