"""Layers with a fixed mask, which is neither a parameter nor saved in checkpoints.

A mask is a buffer outside of the state dict. Its values are restored where such a buffer would otherwise be left
uninitialised: in a module made on the meta device that gets its weights later, and after
:meth:`torch.nn.Module.to_empty`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpc_ext.nn.typed import Module

__all__ = ["FixedMask"]


class FixedMask(Module, ABC):
    """Base class of layers with one mask: subclasses define :meth:`_mask_values` and call :meth:`_register_mask`."""

    # Name of the buffer.
    _mask_buffer = "mask"

    @abstractmethod
    def _mask_values(self) -> Tensor:
        """Return the mask that the layer is made with, on the CPU, which is the default device during this call."""

    def _register_mask(self) -> None:
        """Register the mask on the default device."""
        values = self._values_on_cpu().to(torch.get_default_device(), copy=True)
        self.register_buffer(self._mask_buffer, values, persistent=False)

    def _values_on_cpu(self) -> Tensor:
        with torch.device("cpu"):
            return self._mask_values()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedMask:
        before = self.get_buffer(self._mask_buffer)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch has no annotations there.
        after = self.get_buffer(self._mask_buffer)
        # Values that fn does not copy, such as in to_empty, would be lost.
        if after is not before and not after.is_meta:
            after.copy_(self._values_on_cpu() if before.is_meta else before)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        # On the meta device, assign=True only replaces parameters and buffers of the state dict.
        assigned = local_metadata.get("assign_to_params_buffers", False)
        if assigned and self.get_buffer(self._mask_buffer).is_meta and state_dict:
            device = next(iter(state_dict.values())).device
            self._buffers[self._mask_buffer] = self._values_on_cpu().to(device, copy=True)
