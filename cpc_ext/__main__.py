"""Run ``cpc-ext`` as ``python -m cpc_ext``; without arguments it prints the facts that a bug report needs."""

import sys

from cpc_ext.programs.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["info"], prog="python -m cpc_ext"))
