"""`python -m cpc_ext.convert`: convert checkpoints of other programs to runs, and back; see --help.

The work is done in cpc_ext.programs and cpc_ext.interop.
"""

import sys

from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    sys.exit(run_program("convert"))
