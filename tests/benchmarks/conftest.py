"""Puts the benchmarks' folder on the import path, as Python does for a program that is run from it."""

import sys
from pathlib import Path

PROGRAMS = Path(__file__).parents[2] / "python" / "benchmarks"
sys.path.append(str(PROGRAMS))
