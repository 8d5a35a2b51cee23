"""The tools that judge CUDA code are programs beside the package, imported from their own folders."""

import sys
from pathlib import Path

PYTHON = Path(__file__).parents[2] / "python"
sys.path += [str(PYTHON), str(PYTHON / "benchmarks")]
