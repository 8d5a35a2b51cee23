"""The tool that reads machine code is a program beside the package, imported from its own folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "python"))
