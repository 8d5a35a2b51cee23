"""Detection of this machine's devices without PyTorch, whose import would delay every help text by seconds.

The answers are those that PyTorch would give. If PyTorch is already imported, or there is no other source, it is used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

__all__ = ["check_device_name", "default_device", "default_precision"]

_DEVICE_NAME = re.compile(r"(cpu|cuda|mps)(:\d)?")
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of the CUDA driver API.
_CAPABILITY_MAJOR = 75
# The first compute capability with instructions for bfloat16.
_BF16_CAPABILITY = 8


def default_device() -> str:
    """Return the accelerator of this machine, "cuda" or "mps", or "cpu" if there is none."""
    return "cuda" if _cuda_capability() else "mps" if _has_mps() else "cpu"


def default_precision(device: str) -> Literal["bf16", "fp32"]:
    """Return "bf16" if the device has instructions for it (emulated, it is slower than fp32), else "fp32"."""
    kind = device.partition(":")[0]
    native = (kind == "cuda" and _cuda_capability() >= _BF16_CAPABILITY) or (kind == "cpu" and _cpu_has_bf16())
    return "bf16" if native else "fp32"


def check_device_name(name: str) -> str:
    """Return the name; raise ValueError if PyTorch knows no such device name. The device need not exist."""
    if not _DEVICE_NAME.fullmatch(name):
        import torch

        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device: expected a name like cpu, cuda or cuda:1, got {name!r}") from None
    return name


@cache
def _cuda_capability() -> int:
    """Return the major compute capability of the first CUDA device, or 0 if PyTorch has none to compute on."""
    if "torch" not in sys.modules:
        version = _torch_version()
        if version.cuda is None and version.hip is None:
            return 0
        if version.hip is None and sys.platform == "linux":
            return _driver_capability(built_for=int(version.cuda.partition(".")[0]))
    import torch

    if not torch.cuda.is_available():
        return 0
    if torch.version.hip is not None:
        return _BF16_CAPABILITY  # PyTorch takes bf16 to be supported on ROCm.
    return torch.cuda.get_device_properties(torch.cuda.current_device()).major


def _torch_version() -> ModuleType:
    """Load the module ``torch.version`` by itself, without importing the package."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    spec = importlib.util.spec_from_file_location("torch_version", Path(torch.origin).with_name("version.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _driver_capability(*, built_for: int) -> int:
    """Ask the driver for :func:`_cuda_capability`, for a PyTorch that was built for this major version of CUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version, count, device, major = (ctypes.c_int() for _ in range(4))
    failed = driver.cuDriverGetVersion(ctypes.byref(version)) or version.value // 1000 < built_for
    failed = failed or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1
    failed = failed or driver.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    return 0 if failed else major.value


def _has_mps() -> bool:
    if sys.platform != "darwin":
        return False
    import torch

    return torch.backends.mps.is_available()


@cache
def _cpu_has_bf16() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if sys.platform == "linux" and "torch" not in sys.modules:
        try:
            with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
                flags = next((line.split() for line in file if line.startswith("flags")), None)
        except OSError:
            flags = None
        if flags is not None:
            return "avx512_bf16" in flags or "amx_tile" in flags
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
