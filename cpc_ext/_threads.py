"""The policy by which OpenMP threads wait in the programs: they spin briefly, then sleep.

A thread that spins keeps its core from other threads and processes; one that sleeps starts late in the next parallel
loop. libgomp reads the policy from the environment when it is loaded, which PyTorch and ``cpc_ext._C`` do.
"""

from __future__ import annotations

import os

__all__ = ["spin_briefly"]

# How many times a thread polls for work before it sleeps. libgomp's default is 300 000 (1000 with more threads than
# cores): four processes of two threads on two cores then got 6 to 11 times less done than they should. With this count
# it is mostly 1.3 to 2.6 times, and drawing four small images, in short loops, is no slower on two threads than on one,
# which it is with a count of 1000 (python/benchmarks/oversubscription.py, AMD EPYC without AVX-512).
SPIN_COUNT = 10000


def spin_briefly() -> None:
    """Set the policy for libraries loaded after this call and for child processes, unless the user has chosen one."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
