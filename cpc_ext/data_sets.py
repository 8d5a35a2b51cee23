"""The available data sets: modules found by name, in folders of cpc_ext.data, one folder for each origin of data.

The origin decides which arguments the module's ``load`` takes, and which options of the command lines have no effect.
Importing this module does not import NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cpc_ext._found import found_in

__all__ = ["DATASETS", "Origin", "drawn_of", "folder_of", "idle_of_dataset", "medium", "module_of", "origin"]


class Origin(NamedTuple):
    """Origin of the data of a data set.

    folder: folder of the data sets' modules, below data/images or data/audio.
    sized: whether ``load`` takes the images' size in pixels; always False for sound.
    own_size: whether the images have a size of their own, which presets leave as it is.
    idle: options that have no effect on such data sets, each with the reason.
    """

    folder: str
    sized: bool
    own_size: bool = False
    idle: Mapping[str, str] = {}


_ORIGINS = (
    Origin(
        "drawn",
        sized=True,
        idle=dict.fromkeys(("data_dir", "download"), "is drawn, and reads no files; --dataset names the kind of yours"),
    ),
    Origin("published", sized=False, own_size=True),
    Origin("folders", sized=True, idle={"download": "is of your own files"}),
    Origin("arrays", sized=True, own_size=True, idle={"download": "is of your own files"}),
)
# The origins, by medium.
_MEDIA = {
    "images": _ORIGINS,
    "audio": tuple(kind._replace(sized=False, idle={**kind.idle, "image_size": "is of sound"}) for kind in _ORIGINS),
}
_FOUND = {
    dataset: (kind, medium, module)
    for medium, kinds in _MEDIA.items()
    for kind in kinds
    for dataset, module in found_in(f"cpc_ext.data.{medium}.{kind.folder}").items()
}
DATASETS = tuple(_FOUND)


def medium(dataset: str) -> str:
    """Return the medium of a data set, "images" or "audio".

    KeyError for an unknown name, here and in the functions below that take a data set.
    """
    return _FOUND[dataset][1]


def drawn_of(medium: str) -> str:
    """Return the data set of a medium that needs no files: the first that is drawn at random."""
    return _first(medium, "drawn")


def folder_of(medium: str) -> str:
    """Return the data set of a medium that reads the user's own files, one for each image or recording."""
    return _first(medium, "folders")


def _first(medium: str, folder: str) -> str:
    named = (name for name, (kind, of, _) in _FOUND.items() if (of, kind.folder) == (medium, folder))
    # Not all data sets of the user's own files read one file for each image or recording; "...folder" does.
    return next(name for name in named if folder == "drawn" or name.endswith("folder"))


def origin(dataset: str) -> Origin:
    """Return the origin of a data set."""
    return _FOUND[dataset][0]


def module_of(dataset: str) -> str:
    """Return the name of the module that loads a data set."""
    return _FOUND[dataset][2]


def idle_of_dataset(dataset: str) -> dict[str, str]:
    """Return the options that have no effect on a data set, each with the reason."""
    reasons = dict(origin(dataset).idle)
    if (medium(dataset), origin(dataset).folder) != ("audio", "drawn"):
        reasons["utterances"] = "has no drawn voices"
    return {name: f"--dataset {dataset} {reason}" for name, reason in reasons.items()}
