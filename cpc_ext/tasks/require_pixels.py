"""The check that a data set holds images, for models that do not take codes."""

from __future__ import annotations

from cpc_ext.data import Dataset

__all__ = ["require_pixels"]


def require_pixels(dataset: Dataset) -> None:
    """Raise ValueError if a data set holds codes."""
    if dataset.pretrain.images.dtype.name != "uint8":
        raise ValueError(
            f"--dataset {dataset.name} holds codes, on which --model pixelcnn and gated-pixelcnn train with --levels"
        )
