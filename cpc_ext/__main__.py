"""``python -m cpc_ext`` is ``cpc-ext``; without arguments it prints what to put into a bug report."""

import sys

from cpc_ext.programs.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["info"], prog="python -m cpc_ext"))
