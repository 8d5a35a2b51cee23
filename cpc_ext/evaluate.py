"""`python -m cpc_ext.evaluate RUN`: how few labels an encoder needs; see --help. The work is in cpc_ext.evaluation."""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("evaluate"))
