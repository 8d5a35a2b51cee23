"""Conversion of the prediction matrices W_k: one 1x1 convolution per step in the programs, one tensor in cpc_ext."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cpc_ext.interop.errors import CheckpointError

__all__ = ["matrices_from_ours", "matrices_to_ours"]

_NAME = re.compile(r"W_k\.(\d+)\.weight")


def matrices_to_ours(state: Mapping[str, Tensor], what: str) -> Tensor:
    """Convert {"W_k.K.weight": [E, D, 1, 1]} of all steps to [steps, E, D]. what: whose they are, for messages.

    Raises CheckpointError if names, step numbers or shapes are not as expected.
    """
    steps = {int(found[1]): value for name, value in state.items() if (found := _NAME.fullmatch(name))}
    shapes = {tuple(value.shape) for value in steps.values()}
    others = [name for name in state if not _NAME.fullmatch(name)]
    if others or sorted(steps) != list(range(len(steps))) or len(shapes) != 1 or next(iter(shapes))[2:] != (1, 1):
        raise CheckpointError(
            f"{what}: expected W_k.0.weight, W_k.1.weight ... of one shape [E, D, 1, 1], got "
            f"{ {name: list(value.shape) for name, value in state.items()} }"
        )
    return torch.stack([steps[step] for step in range(len(steps))])[..., 0, 0]


def matrices_from_ours(weight: Tensor) -> dict[str, Tensor]:
    """Convert [steps, E, D] to {"W_k.K.weight": [E, D, 1, 1]}."""
    return {f"W_k.{step}.weight": matrix[..., None, None].clone() for step, matrix in enumerate(weight.detach())}
