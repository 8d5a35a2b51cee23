"""`python -m cpc_ext.embed RUN --data-dir D`: encode images; see --help. The work is done in cpc_ext.programs."""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("embed"))
