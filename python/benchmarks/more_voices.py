"""`python -m cpc_ext.train` on more of the drawn voices than the data set has: more_voices.py UTTERANCES OPTIONS...

Utterances are of each speaker to learn from, the first of which are those of the data set. What is measured of such a
run is measured by the data set's own.
"""

from __future__ import annotations

import sys

from cpc_ext.data.audio.drawn import voices
from cpc_ext.programs.entry import run_program

if __name__ == "__main__":
    _, utterances, *options = sys.argv
    voices.SPLIT_SIZES["train"] = int(utterances)
    sys.argv[1:] = options
    sys.exit(run_program("train"))
