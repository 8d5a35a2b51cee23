"""`python -m cpc_ext.evaluate RUN`: how few labels an encoder needs; see --help. The work is in cpc_ext.training."""

import sys

from cpc_ext.training.evaluation import main

if __name__ == "__main__":
    sys.exit(main())
