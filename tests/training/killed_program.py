"""Runs a program that is killed just before its n-th access to a file of its folder. This is not a test by itself.

Reads lines of arguments as JSON: "train" or "convert", n, the folder, and the program's arguments. Answers each line
with the program's exit status, -9 if it was killed. Every run is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cpc_ext.data import Dataset, make_textures
from cpc_ext.programs import convert
from cpc_ext.programs import training as program
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.training import run_data

PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {"train": program.main, "convert": convert.main}
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def run(name: str, number: int, folder: str, arguments: Sequence[str]) -> int:
    touched = 0

    def kill(event: str, values: tuple[object, ...]) -> None:
        nonlocal touched
        if event in EVENTS and isinstance(values[0], (str, os.PathLike)) and str(values[0]).startswith(folder):
            touched += 1
            if touched == number:
                os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.dup2(2, 1)  # The answers have standard output for themselves.
    status = 70
    try:
        sys.addaudithook(kill)
        status = PROGRAMS[name](arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    images = make_textures(16, split="train", size=32)
    dataset = Dataset(
        "textures", images, images, replace(images), tuple(map(str, range(10))), (0.5,) * 3, (0.2,) * 3, 0.5, 0.2
    )
    run_data.load_dataset = lambda *arguments, **options: dataset
    CPCv1Task.evaluate = lambda task: {}
    CPCv1Task.save = lambda task, run: None
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
