"""What the programs share: from arguments to a command, from the command to work, from how that ends to an exit status.

Options are checked before what they are for is imported: a wrong one, the help and the version cost no PyTorch.
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

# The field lists the option in the help; :func:`parse_command` answers it.
_VERSION = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="Show the version of cpc_ext and exit.", help_behavior_hint=""),
]


@dataclass(frozen=True)
class Program(Generic[T]):
    """A program that turns its command line into an object and does one thing with it.

    Attributes:
        name: of ``python -m cpc_ext.NAME``.
        description: what it does, for the help.
        command: a dataclass, of which a field is an option, described where the command line describes it.
        check: raises TrainingError for values that cannot be right, or do not go together, whatever is on the disk.
        work: the function that does it, as MODULE:NAME, imported once the options are found to be right.
        interrupted: what is said after Ctrl-C.
    """

    name: str
    description: str
    command: type[T]
    check: Callable[[T], None]
    work: str
    interrupted: str = "interrupted"

    def main(self, arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
        """Run the program with these arguments (default: those of the process); returns the exit status.

        0: done. 1: it could not be done, for a reason that was printed. 2 (raised as SystemExit): wrong options.
        130: Ctrl-C; what was finished is kept.
        """
        prog = prog or f"python -m cpc_ext.{self.name}"
        command = parse_command(self.command, arguments, prog=prog, description=self.description)
        return exit_status(lambda: self._do(command), interrupted=self.interrupted)

    def _do(self, command: T) -> None:
        self.check(command)
        module, _, function = self.work.partition(":")
        getattr(import_module(module), function)(command)


def with_home(arguments: Sequence[str]) -> list[str]:
    """Arguments in which --name=~/path has the user's home folder, which shells put in place of ~ but not after =."""
    split = (argument.partition("=") for argument in arguments)
    return [f"{name}{given}{expanduser(value) if name.startswith('--') else value}" for name, given, value in split]


def parse_command(command: type[T], arguments: Sequence[str] | None, *, prog: str, **options: Any) -> T:
    """Turn arguments (None: those of the process) into a command; with further options of :func:`tyro.cli`.

    Raises SystemExit, with status 2 after telling what is allowed, for wrong options, or with 0 after showing the help
    or the version.
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
    """TrainingError where a command, a dataclass, has one of these options that would have no effect for a reason.

    One that has its default may as well not have been given.
    """
    for field in fields(command):
        if field.name in names and getattr(command, field.name) != field.default:
            raise TrainingError(f"{option(field.name)} would have no effect: {reason}")


def exit_status(work: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Run a program's work: its own status, else 0; 1 after printing an error; 128 + the number of a signal."""
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
