"""Golden problems: inputs, weights and results in float64, computed by the published programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor


class Golden(NamedTuple):
    """One stored problem: its tensors by name, and its configuration."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def state(self, prefix: str = "state.") -> dict[str, Tensor]:
        """The weights under ``prefix``, by the program's own parameter names."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture
def context_state() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Renames the weights of the programs' gated PixelCNN of four layers to ours."""

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        unused = "stack.layers.3.residual_vertical."
        return {
            key.removeprefix("stack."): value
            for key, value in state.items()
            if not key.endswith(".mask") and not key.startswith(unused)
        }

    return rename


def _parse(value: str) -> Any:
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return value


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Loads the problem of a name."""

    def load(name: str) -> Golden:
        with safe_open(Path(__file__).parent / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return Golden(tensors, {key: _parse(value) for key, value in file.metadata().items()})

    return load
