"""What a checkpoint keeps of the images that it was trained on, to tell when they are others."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data import ImageSet

__all__ = ["data_record", "differences", "fingerprint"]

# Images whose pixels count in a data set's fingerprint, evenly spread: all would take as long as a pass over them.
_SAMPLED_IMAGES = 256


def data_record(images: ImageSet) -> dict[str, Any]:
    """Number and shape of the images, and digests of their names, their labels, and the pixels of a sample of them."""
    names = None if images.paths is None else hashlib.sha256()
    if names is not None:
        for path in images.paths or ():
            # A file name may hold bytes that are no text in any encoding.
            names.update(path.encode(errors="surrogateescape") + b"\0")
    return {
        "images": len(images),
        "shape": list(images.images.shape[1:]),
        "names": None if names is None else names.hexdigest(),
        "labels": None if images.labels is None else hashlib.sha256(images.labels.tobytes()).hexdigest(),
        "pixels": fingerprint(images, {}),
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records, as a reader would say it; nothing where one of them does not have it."""
    said = []
    for name, value in then.items():
        if name in now and value != now[name]:
            if name == "images":
                said.append(f"{value} images then, {now[name]} now")
            elif name == "shape":
                said.append(f"images of shape {value} then, {now[name]} now")
            else:
                said.append(f"other {name}")
    # All else follows from it.
    return said[:1] if "images" in now and then.get("images") != now["images"] else said


def fingerprint(images: ImageSet, weights: dict[str, Tensor], **others: object) -> str:
    """A digest of what outputs depend on: images (their number, shape, and a sample), weights, and whatever else."""
    digest = hashlib.sha256(repr((images.images.shape, sorted(others.items()))).encode())
    for index in np.linspace(0, max(len(images) - 1, 0), min(_SAMPLED_IMAGES, len(images)), dtype=np.int64):
        digest.update(np.ascontiguousarray(images.images[index]).data)
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
