"""Running of cpc_ext's programs by benchmarks, each in a process of its own on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["call"]


def call(program: str | Path, *arguments: str) -> None:
    """Run `python -m cpc_ext.PROGRAM`, or a script, on one thread. Raises SystemExit with its stderr if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    named = [str(program)] if isinstance(program, Path) else ["-m", f"cpc_ext.{program}"]
    command = [sys.executable, *named, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
