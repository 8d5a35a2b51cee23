"""Peak memory of a call beyond what was allocated before it, as PyTorch's allocators count it.

On CUDA it is the caching allocator's peak minus what was allocated before. On the CPU PyTorch's profiler records every
allocation and release of the CPU allocator, including oneDNN's buffers, and the peak is their largest running sum. The
call's results count, as they exist at its end. Memory that a kernel allocates itself, with malloc or on its stack, is
not counted, nor are thread pools, code and rounding to pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_extra_bytes"]

# Otherwise the profiler writes two lines to stderr for every measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_extra_bytes(call: Callable[[], object], device: torch.device | str) -> int:
    """Return the peak of bytes allocated during ``call``, beyond those allocated when it started."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        result = call()
    del result
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak
