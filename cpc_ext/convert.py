"""`python -m cpc_ext.convert`: checkpoints of other programs to runs, and back; see --help.

The work is done in cpc_ext.training and cpc_ext.interop.
"""

import sys

from cpc_ext.training.converting import main

if __name__ == "__main__":
    sys.exit(main())
