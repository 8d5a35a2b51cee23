"""The common entry point of all programs: `cpc-ext NAME`, `python -m cpc_ext NAME` and `python -m cpc_ext.NAME`.

It sets up the process before anything else is imported, and handles endings that are not errors: Ctrl-C, and a closed
pipe on the output.
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
    "evaluate": "evaluate a run's encoder with few labels",
    "sample": "sample images from a run's PixelCNN",
    "embed": "write the encodings of images or recordings by a run's encoder",
    "convert": "convert checkpoints of other programs into runs, and back",
    "check": "compare every op with its reference on this machine, for bug reports",
    "info": "describe this build and the machine, for bug reports",
}


def main(arguments: Sequence[str] | None = None, *, prog: str = "cpc-ext") -> int:
    """Run the program that the first argument names, with the other arguments; returns its exit status.

    Raises SystemExit with status 2, after listing the programs, if there is no such program.
    """
    return _settled(lambda: _dispatch(list(sys.argv[1:] if arguments is None else arguments), prog))


def run_program(name: str) -> int:
    """Run one program with the arguments of the process, as `python -m cpc_ext.NAME`; returns its exit status."""
    return _settled(lambda: _run(name, sys.argv[1:], f"python -m cpc_ext.{name}"))


def _dispatch(arguments: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Contrastive predictive coding for PyTorch.",
        epilog=f"{prog} NAME --help lists options.",
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
    """Set up the process, run a program, and return its exit status, without a traceback for expected endings."""
    spin_briefly()
    _print_in_any_encoding()
    try:
        try:
            with _plain_warnings():
                status = work()
        finally:
            sys.stdout.flush()  # At interpreter exit it would be too late to report a write error.
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
    """Print the package's own warnings in the block as the programs do, without file name and source line."""
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
    """End a process that torchrun started with others by ``os._exit``, before Python's shutdown.

    After DistributedDataParallel has used a process group, PyTorch keeps gloo's threads alive even when the group is
    destroyed. One that still runs at Python's shutdown aborts the process ("terminate called without an active
    exception"), and torchrun would report a complete run as failed.
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
    """Redirect stdout to /dev/null, because Python would report an error if it flushed its buffer at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_in_any_encoding() -> None:
    """Allow any text to be printed if the output's encoding, such as ASCII, lacks its characters.

    File names may contain bytes that are not valid text in any encoding; with UTF-8 they are printed unchanged.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        if not stream.encoding.lower().replace("-", "").startswith("utf"):
            stream.reconfigure(errors="replace")
            os.environ.setdefault("PYTHON_TYRO_UTF8_BOXES", "False")
        elif stream is sys.stdout:  # stderr escapes such bytes by default.
            stream.reconfigure(errors="surrogateescape")
