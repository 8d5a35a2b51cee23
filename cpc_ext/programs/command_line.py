"""Code shared by the programs: it parses arguments into a command, runs the command, and returns the exit status.

Options are checked before the work is imported, so that a wrong option, the help and the version need no PyTorch.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from importlib import import_module
from os.path import expanduser
from typing import Annotated, Any, Generic, TypeVar

import tyro

from cpc_ext._version import __version__
from cpc_ext.training.config import option
from cpc_ext.training.errors import TrainingError, speaker
from cpc_ext.training.stop_request import EndedBySignal

__all__ = ["Program", "exit_status", "parse_command", "refuse_idle", "with_home"]

T = TypeVar("T", bound=Hashable)

# This field only makes the help list --version; :func:`parse_command` handles the option.
_VERSION = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="Show the version of cpc_ext and exit.", help_behavior_hint=""),
]


@dataclass(frozen=True)
class Program(Generic[T]):
    """A program that parses its command line into an object and passes it to one function.

    Attributes:
        name: NAME in ``python -m cpc_ext.NAME``.
        description: description of the program in its help.
        command: a dataclass whose fields are the options, with their help texts.
        check: raises TrainingError for values that are wrong or contradict each other.
        work: the function that does the work, as MODULE:NAME, imported after the options are checked.
        interrupted: message after Ctrl-C.
    """

    name: str
    description: str
    command: type[T]
    check: Callable[[T], None]
    work: str
    interrupted: str = "interrupted"

    def main(self, arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
        """Run the program with these arguments (default: those of the process); returns the exit status.

        0: success. 1: an error, which was printed. 2 (raised as SystemExit): wrong options. 130: Ctrl-C; finished
        results are kept.
        """
        prog = prog or f"python -m cpc_ext.{self.name}"
        command = parse_command(self.command, arguments, prog=prog, description=self.description)
        return exit_status(lambda: self._do(command), interrupted=self.interrupted)

    def _do(self, command: T) -> None:
        self.check(command)
        module, _, function = self.work.partition(":")
        getattr(import_module(module), function)(command)


def with_home(arguments: Sequence[str]) -> list[str]:
    """Replace ~ in arguments such as --name=~/path by the user's home folder, as shells do not expand it after =."""
    split = (argument.partition("=") for argument in arguments)
    return [f"{name}{given}{expanduser(value) if name.startswith('--') else value}" for name, given, value in split]


def parse_command(command: type[T], arguments: Sequence[str] | None, *, prog: str, **options: Any) -> T:
    """Parse arguments (None: those of the process) into a command; ``options`` are passed to :func:`tyro.cli`.

    Raises SystemExit with status 2 for wrong options, after printing what is allowed, or with status 0 after showing
    the help or the version.
    """
    given = with_home(sys.argv[1:] if arguments is None else arguments)
    version = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    version.add_argument("--version", action="version", version=f"cpc_ext {__version__}")
    version.parse_known_args(given)
    parsed: T = tyro.cli(_with_version(command), prog=prog, args=given, **options)
    return parsed


@cache
def _with_version(command: type[Any]) -> type[Any]:
    return make_dataclass(command.__name__, [("version", _VERSION, False)], bases=(command,), frozen=True)


def refuse_idle(command: Any, names: Collection[str], reason: str) -> None:
    """Raise TrainingError if one of these options of a command, a dataclass, was given but would have no effect.

    Only options that differ from their default count as given. ``reason`` says why they have no effect.
    """
    for field in fields(command):
        if field.name in names and getattr(command, field.name) != field.default:
            raise TrainingError(f"{option(field.name)} would have no effect: {reason}")


def exit_status(work: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Run a program's work and return the exit status.

    It is the work's own status, or 0 if that is None; 1 after a TrainingError, which is printed; 128 + the signal's
    number after a signal.
    """
    try:
        return work() or 0
    except TrainingError as error:
        print(f"{speaker()}error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except EndedBySignal as ended:
        print(f"{speaker()}ended by {ended}", file=sys.stderr)
        return 128 + ended.signal
