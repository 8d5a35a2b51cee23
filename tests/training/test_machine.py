"""Detection of device and precision without PyTorch, against PyTorch's."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpc_ext.training import machine
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.precision import check_device, default_device, default_precision

CODE = """
import json, sys
from cpc_ext.training.machine import default_device, default_precision
answers = [default_device(), default_precision("cpu"), default_precision("cuda:0"), default_precision("mps")]
print(json.dumps([answers, "torch" in sys.modules]))
"""


def of_pytorch() -> list[str]:
    """Return the device and precision according to PyTorch's functions."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    cpu_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    cuda_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return [device, *("bf16" if native else "fp32" for native in (cpu_bf16, cuda_bf16)), "fp32"]


def test_pytorch_would_say_the_same():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": str(Path(machine.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    answers, imported = json.loads(done.stdout)
    assert answers == of_pytorch()
    assert [default_device(), *map(default_precision, ("cpu", "cuda:0", "mps"))] == of_pytorch()
    if sys.platform == "linux":
        assert not imported


class Driver:
    """Stub of libcuda: with a version, a number of devices and their compute capability, or failing to initialise."""

    def __init__(self, *, version: int = 13000, devices: int = 1, capability: int = 9, broken: bool = False) -> None:
        self.version, self.devices, self.capability, self.broken = version, devices, capability, broken

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0

    def cuInit(self, flags):
        return 999 if self.broken else 0

    def cuDeviceGetCount(self, count):
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 40 + ordinal
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert (attribute, device.value) == (75, 40)
        value._obj.value = self.capability
        return 0


@pytest.mark.parametrize(
    ("driver", "capability"),
    [
        (Driver(), 9),
        (Driver(capability=7), 7),
        (Driver(version=13010), 9),
        (Driver(version=12090), 0),  # Too old for this PyTorch.
        (Driver(devices=0), 0),
        (Driver(broken=True), 0),
    ],
)
def test_what_the_driver_says(monkeypatch, driver, capability):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert machine._driver_capability(built_for=13) == capability


def test_no_driver_is_no_device(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine._driver_capability(built_for=13) == 0


@pytest.mark.parametrize(
    ("capability", "device", "precision"), [(0, "cpu", "fp32"), (7, "cuda", "fp32"), (8, "cuda", "bf16")]
)
def test_device_and_precision_follow_from_the_capability(monkeypatch, capability, device, precision):
    monkeypatch.setattr(machine, "_cuda_capability", lambda: capability)
    monkeypatch.setattr(machine, "_has_mps", lambda: False)
    assert machine.default_device() == device
    assert machine.default_precision("cuda") == machine.default_precision("cuda:1") == precision


@pytest.mark.parametrize("name", ["toaster", "cuda:", "cuda:-1", "cpu:x", ""])
def test_no_device_has_such_a_name(name):
    with pytest.raises(TrainingError, match=f"--device: expected a name like cpu, cuda or cuda:1, got '{name}'"):
        check_device(name)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "cuda:12", "mps", "meta", "xpu:0"])
def test_names_that_pytorch_knows(name):
    assert machine.check_device_name(name) == name
    assert torch.device(name).type == name.partition(":")[0]
