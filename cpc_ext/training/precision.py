"""The precision of a run, with the autocast and loss scaling that it needs, and the check that a device exists."""

from __future__ import annotations

import torch

from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import check_device_name, default_device, default_precision

__all__ = ["autocast", "check_device", "default_device", "default_precision", "grad_scaler", "patch_dtype"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(name: str) -> torch.device:
    """Return the device of this name. Raises TrainingError if the name is invalid or the device is not available."""
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
    """Return the dtype of the model's input in a run of this precision."""
    return _DTYPES[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which convolutions and matrix products compute in the given precision."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return the loss scaler: fp16 gradients underflow without one; for other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
