"""Number formats of a run, the autocast and loss scaling that each takes; and whether a device is there at all."""

from __future__ import annotations

import torch

from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import check_device_name, default_device, default_precision

__all__ = ["autocast", "check_device", "default_device", "default_precision", "grad_scaler", "patch_dtype"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(name: str) -> torch.device:
    """The device of that name. TrainingError where there is no such name or this machine does not have it."""
    try:
        device = torch.device(check_device_name(name))
    except ValueError as error:
        raise TrainingError(str(error)) from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name} is not available here ({reason}); --device cpu always is") from None
    return device


def patch_dtype(precision: str) -> torch.dtype:
    """Type that a run of this precision feeds its model with."""
    return _DTYPES[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which convolutions and products compute in the given precision."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling: fp16 gradients underflow without it; for the others it is a pass-through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
