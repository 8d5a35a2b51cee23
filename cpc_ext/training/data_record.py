"""What a checkpoint keeps of the images that it was trained on, to tell when they are others."""

from __future__ import annotations

import hashlib
from typing import Any

from cpc_ext.data import ImageSet
from cpc_ext.training.output_cache import fingerprint

__all__ = ["data_record", "differences"]


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
