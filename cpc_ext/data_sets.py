"""The data sets there are: modules found by their names, in folders of cpc_ext.data that tell where data come from.

Where its data come from decides what the module's ``load`` takes, and which options of the command lines have nothing
to decide. Importing this does not import NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cpc_ext._found import found_in

__all__ = ["DATASETS", "Origin", "idle_of_dataset", "module_of", "origin"]


class Origin(NamedTuple):
    """Where data come from.

    folder: of the modules of such data sets, below data/images and the like.
    sized: whether they take the size that they are asked for.
    idle: options that they have no use for, each with the reason.
    """

    folder: str
    sized: bool
    idle: Mapping[str, str] = {}


_ORIGINS = (
    Origin("drawn", sized=True, idle=dict.fromkeys(("data_dir", "download"), "is drawn, and reads no files")),
    Origin("published", sized=False),
    Origin("folders", sized=True, idle={"download": "is of your own images"}),
)
_FOUND = {
    dataset: (origin, module)
    for origin in _ORIGINS
    for medium in found_in("cpc_ext.data", packages=True).values()
    for dataset, module in found_in(f"{medium}.{origin.folder}").items()
}
DATASETS = tuple(_FOUND)


def origin(dataset: str) -> Origin:
    """Where a data set comes from. KeyError for a name that does not exist; so do those below."""
    return _FOUND[dataset][0]


def module_of(dataset: str) -> str:
    """The name of the module that loads a data set."""
    return _FOUND[dataset][1]


def idle_of_dataset(dataset: str) -> dict[str, str]:
    """The options that a data set has no use for, each with the reason why."""
    return {name: f"--dataset {dataset} {reason}" for name, reason in origin(dataset).idle.items()}
