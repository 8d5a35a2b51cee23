"""Libraries that some data sets need and others do not."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(name: str, extra: str, what: str) -> Any:
    """A library's module. ImportError that says how to get it where it is missing.

    extra: of ours, which brings it. what: it reads, in the plural.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: without a shared library of its own.
        library = name.partition(".")[0]
        raise ImportError(f"{what} are read by {library} ({error}): pip install 'cpc_ext[{extra}]'") from error
