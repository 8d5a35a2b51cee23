"""The check that encodings are finite, made before measuring, since a single one that is not spoils the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpc_ext.training.errors import EncodingsNotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_finite"]


def check_finite(name: str, features: Tensor) -> None:
    """Raise EncodingsNotFiniteError if a row of features [N, D] is not finite. name: the argument's name."""
    wrong = int((~features.isfinite()).any(1).sum())
    if wrong:
        raise EncodingsNotFiniteError(
            f"{name}: expected finite numbers, got {wrong} of {len(features)} rows with others"
        )
