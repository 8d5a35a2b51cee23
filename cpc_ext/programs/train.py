"""The program `python -m cpc_ext.train`: a model and its training. The options are those of cpc_ext.training.cli."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cpc_ext.training.cli import PROGRAM, parse
from cpc_ext.training.errors import TrainingError, speaker

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, *, prog: str = PROGRAM) -> int:
    """As :func:`cpc_ext.training.program.main`, which is imported only once the options are found to be right."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments, prog=prog)
    except TrainingError as error:
        print(f"{speaker()}error: {error}", file=sys.stderr)
        return 1
    from cpc_ext.training import program

    return program.main(command)
