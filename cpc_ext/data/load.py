"""Data sets by name: from a name and the options of the command line to the images."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data_sets import DATASETS, module_of, origin


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open a dataset by its name.

    name: one of DATASETS, such as "textures" (drawn, needs nothing), "stl10" (published files) or "folder".
    data_dir: for "folder" the tree of images; for the published ones the folder they lie or are to be put in
        (default: "datasets" in the cache folder).
    download: fetch a published dataset that is not there.
    image_size: side in pixels of those that are drawn (default 96) and of "folder" (see its module); others have their
        own.
    seed: of those that are drawn.

    Raises ValueError for an unknown name, an argument the dataset has no use for, or damaged files; FileNotFoundError
    where there are none; DownloadError, an OSError, where fetching fails.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    load, kind = import_module(module_of(name)).load, origin(name)
    if kind.folder == "drawn":
        drawn: Dataset = load(size=96 if image_size is None else image_size, seed=seed)
        return drawn
    if kind.folder == "folders":
        if data_dir is None:
            raise ValueError(f"dataset {name!r}: expected --data-dir with the folder of images, got none")
        found: Dataset = load(data_dir, image_size=image_size)
        return found
    dataset: Dataset = load(data_dir, download=download)
    side = dataset.image_shape[-1]
    if image_size not in (None, side):
        raise ValueError(f"image_size: the images of {name} have {side} pixels a side, got {image_size}")
    return dataset
