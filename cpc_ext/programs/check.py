"""The program `cpc-ext check`: its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cpc_ext.programs.command_line import Program

__all__ = ["Command", "main"]

_DESCRIPTION = (
    "Compare every op, forward and backward and in every dtype, with its plain PyTorch reference on this machine's "
    "devices. Prints a table, and descriptions of the build and the machine, which a bug report should contain. The "
    "exit status is 0 if all ops agree with their references."
)


@dataclass(frozen=True)
class Command:
    """The parsed options; their help texts describe them."""

    device: Annotated[
        Literal["all", "cpu", "cuda"], tyro.conf.arg(help="Devices to run on. all: the CPU and every CUDA device.")
    ] = "all"


main = Program(
    name="check",
    description=_DESCRIPTION,
    command=Command,
    check=lambda command: None,
    work="cpc_ext.programs.checking:check",
).main
