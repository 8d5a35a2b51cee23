"""Import of libraries that only some data sets need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(name: str, extra: str, what: str) -> Any:
    """Import a module of an optional library. Raises ImportError that says how to install it if it is missing.

    extra: the extra of cpc_ext that installs it. what: noun for what it reads, in the plural.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: the library lacks a shared library that it needs.
        library = name.partition(".")[0]
        raise ImportError(f"{what} are read by {library} ({error}): pip install 'cpc_ext[{extra}]'") from error
