"""`python -m cpc_ext.check`: compare every op with its reference; see --help. The problems are in cpc_ext.op_checks."""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("check"))
