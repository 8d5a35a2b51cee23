"""Number formats of a run: which one a device computes natively, and the autocast and loss scaling that each takes."""

from __future__ import annotations

import torch

from cpc_ext.training.errors import TrainingError

__all__ = ["autocast", "check_device", "default_device", "default_precision", "grad_scaler", "patch_dtype"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> str:
    """The accelerator of this machine, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The device of that name. TrainingError where this machine does not have it."""
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name} is not available here ({reason}); --device cpu always is") from None
    return device


def default_precision(device: str) -> str:
    """ "bf16" where the device has instructions for it (emulated, it is slower than fp32), else "fp32"."""
    kind = device.partition(":")[0]
    if kind == "cuda" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return "bf16" if native else "fp32"


def patch_dtype(precision: str) -> torch.dtype:
    """Type that a run of this precision feeds its model with."""
    return _DTYPES[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which convolutions and products compute in the given precision."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling: fp16 gradients underflow without it; for the others it is a pass-through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
