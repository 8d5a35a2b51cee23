"""The one way into all programs: `cpc-ext NAME`, `python -m cpc_ext NAME` and `python -m cpc_ext.NAME`.

It sees to what has to be settled before anything is imported, and to ends that are no errors: Ctrl-C, and a reader of
the output who has seen enough.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from cpc_ext._threads import spin_briefly
from cpc_ext._version import __version__
from cpc_ext.training.errors import warn

__all__ = ["PROGRAMS", "main", "run_program"]

_PACKAGE = Path(__file__).parents[1]

PROGRAMS = {
    "train": "train a model of images or of speech without labels",
    "evaluate": "measure a run's encoder with few labels",
    "sample": "draw images from a run's PixelCNN",
    "embed": "write the encodings of images or recordings by a run's encoder",
    "convert": "turn checkpoints of other programs into runs, and back",
    "check": "compare every op with its reference on this machine, for bug reports",
    "info": "show what this build holds and what it runs on, for bug reports",
}


def main(arguments: Sequence[str] | None = None, *, prog: str = "cpc-ext") -> int:
    """The program that the first argument names, with the others; returns its exit status.

    Raises SystemExit with status 2, after listing the programs, where there is no such program.
    """
    return _settled(lambda: _dispatch(list(sys.argv[1:] if arguments is None else arguments), prog))


def run_program(name: str) -> int:
    """One program with the arguments of the process, as `python -m cpc_ext.NAME`; returns its exit status."""
    return _settled(lambda: _run(name, sys.argv[1:], f"python -m cpc_ext.{name}"))


def _dispatch(arguments: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description="Contrastive predictive coding for PyTorch.", epilog=f"{prog} NAME --help tells more."
    )
    parser.add_argument("--version", action="version", version=f"cpc_ext {__version__}")
    programs = parser.add_subparsers(dest="name", required=True, title="programs")
    for name, what in PROGRAMS.items():
        programs.add_parser(name, help=what, add_help=False)
    # The other arguments are for the program itself.
    name = parser.parse_args(arguments[:1]).name
    return _run(name, arguments[1:], f"{prog} {name}")


def _run(name: str, arguments: list[str], prog: str) -> int:
    status: int = importlib.import_module(f"cpc_ext.programs.{name}").main(arguments, prog=prog)
    return status


def _settled(work: Callable[[], int]) -> int:
    """The status of a program that finds the process as it should be, and leaves it without a traceback."""
    spin_briefly()
    _print_in_any_encoding()
    try:
        try:
            with _plain_warnings():
                status = work()
        finally:
            sys.stdout.flush()  # When the process ends it is too late to say anything about errors.
        _end_if_one_of_several(status)
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if not _output_fails():
            raise
        _discard_output()
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """In the block, what the package warns of is printed as the programs print it, without a line of its code."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
                warn(str(message))
            else:
                shown(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _end_if_one_of_several(status: int) -> None:
    """End a process of several, as torchrun starts them, before Python takes itself down.

    Once DistributedDataParallel has known a process group, PyTorch keeps gloo's threads past its destruction, and one
    that meets Python at its end aborts the process ("terminate called without an active exception"): torchrun would
    report a run that is complete as one that failed.
    """
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(status)


def _output_fails() -> bool:
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """Let what Python still holds go nowhere, as it would else complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_in_any_encoding() -> None:
    """Let names and frames be printed where the output's encoding, such as ASCII, lacks their letters.

    Names of files may hold bytes that are no text in any encoding; where that is UTF-8 they are printed as they are.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        if not stream.encoding.lower().replace("-", "").startswith("utf"):
            stream.reconfigure(errors="replace")
            os.environ.setdefault("PYTHON_TYRO_UTF8_BOXES", "False")
        elif stream is sys.stdout:  # Errors escape what they cannot print.
            stream.reconfigure(errors="surrogateescape")
