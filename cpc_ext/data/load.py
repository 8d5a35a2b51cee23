"""Datasets by name: the one place that knows which there are and where each comes from."""

from __future__ import annotations

from pathlib import Path

from cpc_ext.data.images.cifar import load_cifar10, load_cifar100
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.folder import load_folder
from cpc_ext.data.images.stl10 import load_stl10
from cpc_ext.data.images.textures import load_textures

_PUBLISHED = {"stl10": load_stl10, "cifar10": load_cifar10, "cifar100": load_cifar100}
DATASETS = ("textures", *_PUBLISHED, "folder")


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open a dataset by its name.

    name: "textures" (generated, needs nothing), "stl10", "cifar10", "cifar100" (published binary files) or "folder".
    data_dir: for "folder" the tree of images; for the published ones the folder they lie or are to be put in
        (default: "datasets" in the cache folder).
    download: fetch a published dataset that is not there.
    image_size: side in pixels of "textures" (default 96) and of "folder" (see load_folder); others have their own.
    seed: of "textures".

    Raises ValueError for an unknown name, an argument the dataset has no use for, or damaged files; FileNotFoundError
    where there are none; DownloadError, an OSError, where fetching fails.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    if name == "textures":
        return load_textures(size=96 if image_size is None else image_size, seed=seed)
    if name == "folder":
        if data_dir is None:
            raise ValueError("dataset 'folder': expected --data-dir with the folder of images, got none")
        return load_folder(data_dir, image_size=image_size)
    dataset = _PUBLISHED[name](data_dir, download=download)
    side = dataset.image_shape[-1]
    if image_size not in (None, side):
        raise ValueError(f"image_size: the images of {name} have {side} pixels a side, got {image_size}")
    return dataset
