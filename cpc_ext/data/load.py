"""Datasets by name: the one place that knows which there are and where each comes from."""

from __future__ import annotations

from pathlib import Path

from .dataset import Dataset
from .textures import load_textures

DATASETS = ("textures", "stl10", "cifar10", "cifar100", "folder")


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open a dataset by its name, one of DATASETS. (Only "textures" so far.)"""
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    if name == "textures":
        return load_textures(size=image_size or 96, seed=seed)
    raise NotImplementedError(name)
