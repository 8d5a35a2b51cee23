"""Description of the machine for the head of every result file, the files' names, and common arguments."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import cpc_ext
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.precision import check_device

__all__ = ["add_common_arguments", "at_least", "describe", "device_slug", "result_file", "write_json"]


def describe(device: str) -> dict[str, Any]:
    """Return the device, versions, the date, and how the compiled module was built."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads of {_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    build = cpc_ext.build_info()
    del build["module"]
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda_runtime": torch.version.cuda}
    return {"device": name, **versions, "date": str(date.today()), **build}


def _processor() -> str:
    """Return the processor's name, for which Python returns only "x86_64" on most Linux machines."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def device_slug(device: str) -> str:
    """Return "cpu", or a GPU's name in lower case with hyphens, such as "nvidia-h200"."""
    if not device.startswith("cuda"):
        return device
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def result_file(out: Path, device: str, program: str) -> Path:
    """Return the JSON file named by ``--out``: itself, or a dated file in that folder."""
    return out if out.suffix == ".json" else out / f"{date.today()}-{device_slug(device)}-{program}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace the file as a whole, so that an interrupted run leaves its last complete results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, path)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type for whole numbers not below ``least``, such as 2 rounds, which quartiles need."""

    def whole_number(given: str) -> int:
        number = int(given)
        if number < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {number}")
        return number

    return whole_number


def _device(name: str) -> str:
    try:
        return str(check_device(name))
    except TrainingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--quick`` and ``--out``, which all programs here have."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=_device, default=default, metavar="cpu|cuda", help=f"device to run on (default {default})"
    )
    parser.add_argument("--quick", action="store_true", help="few small sizes, to check that everything runs")
    parser.add_argument(
        "--out", type=Path, metavar="DIR|FILE.json", help="write JSON there, and PNG if the program draws charts"
    )
