"""The data sets there are: modules found by their names, in folders of cpc_ext.data that tell where data come from.

A data set is called as its module is, with "-" for "_". Where its data come from decides what the module's ``load``
takes, and which options of the command lines have nothing to decide. Importing this does not import NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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
_ROOT = Path(__file__).parent
_FOUND = {
    path.stem.replace("_", "-"): (origin, path)
    for origin in _ORIGINS
    for path in sorted(_ROOT.glob(f"data/*/{origin.folder}/*.py"))
    if path.stem != "__init__"
}
DATASETS = tuple(_FOUND)


def origin(dataset: str) -> Origin:
    """Where a data set comes from. KeyError for a name that does not exist; so do those below."""
    return _FOUND[dataset][0]


def module_of(dataset: str) -> str:
    """The name of the module that loads a data set."""
    return ".".join(["cpc_ext", *_FOUND[dataset][1].relative_to(_ROOT).with_suffix("").parts])


def idle_of_dataset(dataset: str) -> dict[str, str]:
    """The options that a data set has no use for, each with the reason why."""
    return {name: f"--dataset {dataset} {reason}" for name, reason in origin(dataset).idle.items()}
