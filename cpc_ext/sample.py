"""`python -m cpc_ext.sample RUN`: draw images from a trained PixelCNN; see --help. The work is in cpc_ext.programs."""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("sample"))
