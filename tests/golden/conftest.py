"""Golden problems: inputs, weights and results in float64, computed by the published programs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cpc_ext.interop import Reference, export_reference, read_reference


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


@pytest.fixture
def reference() -> Callable[..., Reference]:
    """Reads the problem of a name as a checkpoint."""

    def load(name: str, source: str, **settings: Any) -> Reference:
        return read_reference(Path(__file__).parent / f"{name}.safetensors", source, **settings)

    return load


@pytest.fixture
def gradients() -> Callable[[Reference], dict[str, Tensor]]:
    """The gradients of a reference's parameters, by the program's names and in its form."""

    def collect(reference: Reference) -> dict[str, Tensor]:
        slopes = copy.deepcopy(reference.model)
        with torch.no_grad():
            for parameter, of in zip(slopes.parameters(), reference.model.parameters(), strict=True):
                parameter.copy_(of.grad)
        return export_reference(slopes, reference.source, form=reference.form)

    return collect
