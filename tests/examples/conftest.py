"""The example programs are imported from their own folder, as Python does for a program."""

import sys
from pathlib import Path

PROGRAMS = Path(__file__).parents[2] / "python" / "examples"
sys.path.append(str(PROGRAMS))
