"""`python -m cpc_ext.sample RUN`: images from a trained PixelCNN; see --help. The work is done in cpc_ext.training."""

import sys

from cpc_ext.training.sampling import main

if __name__ == "__main__":
    sys.exit(main())
