"""What the command lines of all programs share: how they are parsed, and the option ``--version``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from cpc_ext._version import __version__

__all__ = ["VersionOption", "parse_command"]

T = TypeVar("T")

# A field of this type lists the option in the help; :func:`parse_command` answers it.
VersionOption = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="Show the version of cpc_ext and exit.", help_behavior_hint=""),
]


def parse_command(command: type[T], arguments: Sequence[str] | None, *, prog: str, **options: Any) -> T:
    """Turn arguments (None: those of the process) into a command; with further options of :func:`tyro.cli`.

    Raises SystemExit, with status 2 after telling what is allowed, for wrong options, or with 0 after showing the help
    or the version.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    version = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    version.add_argument("--version", action="version", version=f"cpc_ext {__version__}")
    version.parse_known_args(given)
    return tyro.cli(command, prog=prog, args=given, **options)
