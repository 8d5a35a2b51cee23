"""Loading of a data set by its name and the options of the command line."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from cpc_ext.data.audio.dataset import SpeechDataset
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data_sets import DATASETS, medium, module_of, origin


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    utterances: int | None = None,
    seed: int = 0,
) -> Dataset | SpeechDataset:
    """Open a dataset by its name: a Dataset of images, or a SpeechDataset.

    name: one of DATASETS, such as "textures" or "voices" (generated, need no files), "stl10" (published files) or
        "folder".
    data_dir: the user's files for "folder", "npy" and the like; for published datasets the folder that holds their
        files or is to hold them (default: "datasets" in the cache folder).
    download: fetch a published dataset that is missing.
    image_size: side in pixels of generated images (default 96) and of the user's own (see the module of "folder"); for
        other datasets it is fixed.
    utterances: number of utterances of each generated voice for models to learn from (default: the 11 of the probes).
    seed: seed of generated datasets.

    Raises ValueError for an unknown name, an argument that the dataset does not use, or damaged files;
    FileNotFoundError if there are no files; DownloadError, an OSError, if fetching fails; ImportError if a library is
    missing.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    kind, of = origin(name), medium(name)
    if of == "audio" and image_size is not None:
        raise ValueError(f"image_size: {name} is of sound, got {image_size}")
    voices = (of, kind.folder) == ("audio", "drawn")
    if utterances is not None and not voices:
        raise ValueError(f"utterances: {name} has no drawn voices, got {utterances}")
    if kind.folder in ("folders", "arrays") and data_dir is None:
        files = "recordings" if of == "audio" else of
        raise ValueError(f"dataset {name!r}: expected --data-dir with the folder of {files}, got none")
    arguments: dict[str, Any] = {"seed": seed} if kind.folder == "drawn" else {"data_dir": data_dir}
    if voices:
        arguments["utterances"] = utterances
    elif kind.folder == "published":
        arguments["download"] = download
    elif kind.folder == "drawn" and kind.sized:
        arguments["size"] = 96 if image_size is None else image_size
    elif kind.sized:
        arguments["image_size"] = image_size
    dataset: Dataset | SpeechDataset = import_module(module_of(name)).load(**arguments)
    if isinstance(dataset, Dataset) and not kind.sized and image_size not in (None, dataset.image_shape[-1]):
        side = dataset.image_shape[-1]
        raise ValueError(f"image_size: the images of {name} have {side} pixels a side, got {image_size}")
    return dataset
