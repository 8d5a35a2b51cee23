"""constraints.txt: its versions are compatible, according to the installed packages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")

REPOSITORY = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if "==" in line)}


def ours() -> set[str]:
    """Return the packages that pyproject.toml requires, including those of extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = chain(project["dependencies"], *project["optional-dependencies"].values())
    return {canonicalize_name(Requirement(each).name) for each in asked}


def needs(names: set[str]) -> Iterator[tuple[str, Requirement]]:
    """Return the requirements of installed packages and their dependencies, with the names of the packages."""
    seen: set[str] = set()
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            asked = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, asked):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield name, requirement
                waiting.append(canonicalize_name(requirement.name))


def test_the_extras_are_found():
    assert {"torch", "soundfile", "timm", "mlflow-skinny", "wandb", "furo"} <= ours()


def test_pins_are_what_installed_packages_ask_for():
    known = pins()
    wrong = [
        f"{name} asks for {requirement}, constraints.txt has {known[package]}"
        for name, requirement in needs(ours())
        if (package := canonicalize_name(requirement.name)) in known
        and not requirement.specifier.contains(known[package], prereleases=True)
    ]
    assert not wrong
