"""`python -m cpc_ext.train`: train an encoder; see --help. The work is done in cpc_ext.programs."""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("train"))
