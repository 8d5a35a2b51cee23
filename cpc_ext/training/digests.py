"""Digests of images and weights, by which cached results are matched to their inputs; they cover every byte."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from cpc_ext.data import ImageSet

__all__ = ["images_digest", "weights_digest"]

# Number of images hashed at a time.
_CHUNK = 256


def images_digest(images: ImageSet) -> str:
    """Return a hexadecimal digest that two image sets share only if all their pixels and labels are equal."""
    digest = hashlib.sha256(f"{images.images.shape}".encode())
    for start in range(0, len(images), _CHUNK):
        digest.update(np.ascontiguousarray(images.images[start : start + _CHUNK]).data)
    if images.labels is not None:
        digest.update(np.ascontiguousarray(images.labels).data)
    return digest.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Return a hexadecimal digest that two models share only if all their weights and buffers are equal."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
