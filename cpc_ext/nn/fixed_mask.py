"""Layers with a mask that is part of what they are: no parameter, and in no checkpoint.

A mask is a buffer outside of the state dict. Its values outlive what would leave such a buffer with whatever was in
memory: a module made on the meta device that gets its weights later, and :meth:`torch.nn.Module.to_empty`.
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
    """A layer with one mask, which subclasses define by :meth:`_mask_values` and register by :meth:`_register_mask`."""

    # The buffer's name.
    _mask_buffer = "mask"

    @abstractmethod
    def _mask_values(self) -> Tensor:
        """The mask as the layer was made with it, on the CPU, which is the default device of this call."""

    def _register_mask(self) -> None:
        """Register the mask where parameters are made by default."""
        values = self._values_on_cpu().to(torch.get_default_device(), copy=True)
        self.register_buffer(self._mask_buffer, values, persistent=False)

    def _values_on_cpu(self) -> Tensor:
        with torch.device("cpu"):
            return self._mask_values()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedMask:
        before = self.get_buffer(self._mask_buffer)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch has no annotations there.
        after = self.get_buffer(self._mask_buffer)
        # What fn does not copy, as to_empty's does not, would be gone.
        if after is not before and not after.is_meta:
            after.copy_(self._values_on_cpu() if before.is_meta else before)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        # What assign=True replaces on the meta device are parameters, and buffers of the state dict.
        assigned = local_metadata.get("assign_to_params_buffers", False)
        if assigned and self.get_buffer(self._mask_buffer).is_meta and state_dict:
            device = next(iter(state_dict.values())).device
            self._buffers[self._mask_buffer] = self._values_on_cpu().to(device, copy=True)
