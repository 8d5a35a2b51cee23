"""Facts about this build of the package and the machine that it runs on, for bug reports."""

from __future__ import annotations

import platform
from typing import Any

__all__ = ["build_info", "report"]


def build_info() -> dict[str, Any]:
    """Return how the compiled module was built and which of its variants is in use.

    The keys are ``version``, ``compiler``, ``simd`` (the level in use: baseline, avx2, avx512 or avx512_bf16; native in
    a build for one processor), ``cuda`` (version of the CUDA toolkit, None in a build without), ``cuda_architectures``
    (None likewise), ``openmp_threads`` and ``module`` (the path of its file).
    """
    from cpc_ext._native import native

    return {**native.build_info(), "module": native.__file__}


def report() -> str:
    """Return facts about the build, PyTorch and the devices, one per line."""
    import torch

    facts = {f"cpc_ext {name}": value for name, value in build_info().items()}
    facts["python"] = f"{platform.python_version()} on {platform.platform()}"
    facts["torch"] = torch.__version__
    facts["torch threads"] = torch.get_num_threads()
    facts["torch cuda"] = torch.version.cuda or "not built in"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory >> 20} MiB, sm_{properties.major}{properties.minor}"
        )
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
