"""Encodings that are no numbers: said before they are measured, as a single one of them spoils what is found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpc_ext.training.errors import EncodingsNotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_finite"]


def check_finite(name: str, features: Tensor) -> None:
    """EncodingsNotFiniteError where a row of features [N, D] is not finite; name: of the argument."""
    wrong = int((~features.isfinite()).any(1).sum())
    if wrong:
        raise EncodingsNotFiniteError(
            f"{name}: expected finite numbers, got {wrong} of {len(features)} rows with others"
        )
