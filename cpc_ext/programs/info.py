"""The program `cpc-ext info`, also `python -m cpc_ext`: prints the build and the machine, for bug reports."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cpc_ext._version import __version__
from cpc_ext.build_info import report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, *, prog: str = "cpc-ext info") -> int:
    """Run the program; returns the exit status 0, or raises SystemExit with 2 for wrong options."""
    parser = argparse.ArgumentParser(prog=prog, description="Describe this build and the machine.")
    parser.add_argument("--version", action="version", version=f"cpc_ext {__version__}")
    parser.parse_args(arguments)
    print(report())
    return 0
