"""The data sets there are: modules found by their names, in folders of cpc_ext.data that tell where data come from.

Where its data come from decides what the module's ``load`` takes, and which options of the command lines have nothing
to decide. Importing this does not import NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cpc_ext._found import found_in

__all__ = ["DATASETS", "Origin", "drawn_of", "folder_of", "idle_of_dataset", "medium", "module_of", "origin"]


class Origin(NamedTuple):
    """Where data come from.

    folder: of the modules of such data sets, below data/images and the like.
    sized: whether they take the size in pixels that they are asked for; sound never does.
    own_size: whether they have one of their own, which presets leave as it is.
    idle: options that they have no use for, each with the reason.
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
# By medium, what origins are like there.
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
    """What a data set is of: "images" or "audio". KeyError for a name that does not exist; so do those below."""
    return _FOUND[dataset][1]


def drawn_of(medium: str) -> str:
    """The data set of a medium that needs no files: the first that is drawn."""
    return _first(medium, "drawn")


def folder_of(medium: str) -> str:
    """The data set of a medium that is of the user's own files, one for each image or recording."""
    return _first(medium, "folders")


def _first(medium: str, folder: str) -> str:
    named = (name for name, (kind, of, _) in _FOUND.items() if (of, kind.folder) == (medium, folder))
    # Some data sets of the user's own files are in files of another kind than the medium's own.
    return next(name for name in named if folder == "drawn" or name.endswith("folder"))


def origin(dataset: str) -> Origin:
    """Where a data set comes from."""
    return _FOUND[dataset][0]


def module_of(dataset: str) -> str:
    """The name of the module that loads a data set."""
    return _FOUND[dataset][2]


def idle_of_dataset(dataset: str) -> dict[str, str]:
    """The options that a data set has no use for, each with the reason why."""
    reasons = dict(origin(dataset).idle)
    if (medium(dataset), origin(dataset).folder) != ("audio", "drawn"):
        reasons["utterances"] = "has no drawn voices"
    return {name: f"--dataset {dataset} {reason}" for name, reason in reasons.items()}
