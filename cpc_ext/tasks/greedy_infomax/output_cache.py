"""A cache of frozen modules' outputs on the disk, computed once, then read through a memory map.

A file is a JSON header, which identifies what it was computed from, followed by one row per image and view. A file that
was computed from anything else is computed anew, and replaced when the new one is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from cpc_ext.data import ImageFetcher, ImageSet
from cpc_ext.data.on_device import send
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import TrainingError, writing
from cpc_ext.training.random_streams import RandomStreams

__all__ = ["OutputCache"]

_HEADER_BYTES = 4096
_BATCH = 50
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class OutputCache:
    """The outputs of ``views`` random views of every image, as the training loop fetches them.

    The run's random stream of views decides which of an image's views a step gets.

    Raises:
        TrainingError: the file is not complete, or its key is not ``key``.
    """

    def __init__(self, path: Path, key: str, images: ImageSet, device: torch.device, streams: RandomStreams) -> None:
        self._labels = ImageFetcher(images, device, resident=False)
        self._device = device
        self._streams = streams
        # Opened once, so that the file that was checked is the one read, even if another run replaces it meanwhile.
        with suppress(FileNotFoundError), open(path, "rb") as file:
            header = _read_header(file)
            if header is not None and header["key"] == key and header["images"] == len(images):
                self._views, self._shape, self._dtype = header["views"], header["shape"], _DTYPES[header["dtype"]]
                self._rows = np.memmap(
                    file,
                    dtype=np.uint8,
                    mode="r",
                    offset=_HEADER_BYTES,
                    shape=(len(images) * self._views, math.prod(self._shape) * self._dtype.itemsize),
                )
                return
        raise TrainingError(f"--cache-outputs: {path} was changed by another run; give each a folder of its own")

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Return the outputs for images at ``indices``, [B, ...] on the device."""
        share = self._streams.share
        drawn = torch.randint(self._views, (share.whole(len(indices)),), generator=self._streams.views)
        rows = indices * self._views + share.part(drawn).numpy()
        outputs = torch.from_numpy(self._rows[rows]).view(self._dtype).view(len(indices), *self._shape)
        return send(outputs, self._device)

    def labels(self, indices: np.ndarray) -> Tensor | None:
        """Return the labels at ``indices``, int64 [B] on the device; None if the images have none."""
        return self._labels.labels(indices)

    @staticmethod
    def fill(
        path: Path,
        key: str,
        images: ImageSet,
        outputs: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        views: int,
    ) -> None:
        """Compute the file unless it exists; if another process is computing it, wait for that one.

        outputs: maps uint8 images [B, C, H, W] on the device to [B, ...], the outputs of a random view of each.

        Raises:
            TrainingError: the disk has no room for the file, or cannot be written to.
        """
        if _key(path) == key:
            return
        with writing(path, "--cache-outputs"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                print(f"waiting for the process that computes {path}", flush=True)
                held = lock.acquire()
            with held:
                if _key(path) != key:
                    _write(path, key, images, outputs, device, views)


def _write(
    path: Path,
    key: str,
    images: ImageSet,
    outputs: Callable[[Tensor], Tensor],
    device: torch.device,
    views: int,
) -> None:
    fetch = ImageFetcher(images, device, resident=False)
    with atomic_file(path) as file:
        for start in tqdm(range(0, len(images), _BATCH), desc="outputs of the frozen modules", disable=None):
            batch = fetch(np.arange(start, min(start + _BATCH, len(images))))
            made = torch.stack([outputs(batch).cpu() for _ in range(views)], dim=1)
            if start == 0:
                shape = list(made.shape[2:])
                _check_space(path, len(images) * made[0].numel() * made.element_size())
                header = {"key": key, "views": views, "shape": shape, "dtype": str(made.dtype), "images": len(images)}
                file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))
            file.write(made.contiguous().view(-1).view(torch.uint8).numpy().data)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise TrainingError(
            f"--cache-outputs: {path.parent} has {free / 2**20:.0f} MiB left, the outputs need {needed / 2**20:.0f} MiB"
        )


def _key(path: Path) -> str | None:
    """Return the key of the file at a path; None if there is no file, or it is not a complete cache."""
    try:
        with open(path, "rb") as file:
            header = _read_header(file)
    except OSError:
        return None
    return None if header is None else header["key"]


def _read_header(file: BinaryIO) -> dict[str, Any] | None:
    """Return a file's header; None if it is not a complete cache."""
    try:
        header = json.loads(file.read(_HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
        numbers = [header["images"], header["views"], *header["shape"]]
        if not isinstance(header["key"], str) or any(type(number) is not int or number < 0 for number in numbers):
            return None
        row = math.prod(header["shape"]) * _DTYPES[header["dtype"]].itemsize
        return header if size == _HEADER_BYTES + header["images"] * header["views"] * row else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
