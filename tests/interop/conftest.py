"""Golden problems as checkpoints of the programs that computed them, and a stand-in for the timm library."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor, nn

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


class TimmNetwork(nn.Module):
    """Has the parameter names of the library's ResNet-18, with few channels."""

    num_features = 4

    def __init__(self, in_chans):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 4, 7, padding=3, bias=False), nn.BatchNorm2d(4)
        self.act1, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        for stack in range(1, 5):
            blocks = nn.Sequential(*(nn.Module() for _ in range(2)))
            for block in blocks:
                block.conv1, block.bn1 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
                block.conv2, block.bn2 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
            setattr(self, f"layer{stack}", blocks)

    def forward(self, patches):
        return self.maxpool(self.act1(self.bn1(self.conv1(patches)))).mean((2, 3))


# In place of the library, which is not installed everywhere; its names are what matters.
TIMM = types.SimpleNamespace(
    create_model=lambda name, in_chans, **options: TimmNetwork(in_chans),
    get_pretrained_cfg_value=lambda name, key: None,
)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TimmEncoder use the stand-in."""
    monkeypatch.setitem(sys.modules, "timm", TIMM)
