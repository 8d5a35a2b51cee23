"""Golden problems as checkpoints of the programs that computed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


class Problem(NamedTuple):
    """path: the file, which loads as a checkpoint. tensors: all it holds. state: the weights by their names."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]


@pytest.fixture(scope="session")
def problem() -> Callable[[str], Problem]:
    """Reads the problem of a name."""

    def read(name: str) -> Problem:
        path = GOLDEN / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
        return Problem(path, tensors, state)

    return read
