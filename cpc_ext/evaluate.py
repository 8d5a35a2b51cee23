"""`python -m cpc_ext.evaluate RUN`: measure how few labels an encoder needs; see --help and cpc_ext.evaluation."""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("evaluate"))
