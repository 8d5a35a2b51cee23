"""The program `python -m cpc_ext.train`, which trains a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cpc_ext.programs.command_line import exit_status
from cpc_ext.programs.train_options import PROGRAM, parse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, *, prog: str = PROGRAM) -> int:
    """Run :func:`cpc_ext.programs.training.main`, which is imported only after the options are checked."""

    def train() -> int:
        command = parse(sys.argv[1:] if arguments is None else arguments, prog=prog)
        from cpc_ext.programs import training

        return training.main(command)

    return exit_status(train)
