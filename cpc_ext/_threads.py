"""How the threads of OpenMP wait for each other in the programs: awake for a moment only, then asleep.

A thread that waits awake keeps its core from whoever else would compute on it; one that sleeps is late for the next
parallel loop. The policy is read from the environment when libgomp is loaded, which PyTorch and ``cpc_ext._C`` do.
"""

from __future__ import annotations

import os

__all__ = ["spin_briefly"]

# Rounds that a thread looks for work before it sleeps. libgomp's own are 300 000 (1000 with more threads than cores):
# four processes of two threads on two cores then got 6 to 11 times less done than they should. With these rounds it is
# mostly 1.3 to 2.6 times, and drawing four small images, in short loops, is no slower on two threads than on one,
# as it is with 1000 rounds (python/benchmarks/oversubscription.py, AMD EPYC without AVX-512).
SPIN_COUNT = 10000


def spin_briefly() -> None:
    """Set the policy for libraries that are loaded later on and for child processes, unless the user has chosen one."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
