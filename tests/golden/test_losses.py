"""Our versions of other libraries' losses, called in the same way, have the same values and gradients in float64.

Golden files hold the libraries' results; if a library is installed (the extra "originals"), it is also run. SupContrast
is not a package: its folder must be in PYTHONPATH. ``python tests/golden/test_losses.py`` writes the files again.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd import grad

from cpc_ext import nn

EXACT = {"atol": 1e-10, "rtol": 0}
Call = Callable[[Any, dict[str, Tensor]], Tensor]  # How a loss is called with named tensors, theirs or ours.

LABELS = torch.tensor([3, 1, 3, -7, 1, 1, 0, 9])
# Weight with which a sample is another's positive: not symmetric, 0 for sample 3, with several values.
MASK = torch.tensor([0.0, 1, 0.5, 0, 0.25]).repeat(13)[:64].view(8, 8).index_fill(0, torch.tensor(3), 0)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    first, second, features = draw(3, 6, 8), draw(3, 6, 8), draw(8, 3, 2, 3)
    return {
        "first": first,
        "second": second,
        "bank": torch.nn.functional.normalize(draw(11, 8), dim=1),
        "scale": draw().abs() + 1,
        "bias": draw() - 1,
        "features": torch.nn.functional.normalize(features, dim=2),
    }


# --- The calls, alike for both ---


def pairs(loss: Any, values: dict[str, Tensor]) -> Tensor:
    return loss(values["first"][0], values["second"][0])


def scaled(loss: Any, values: dict[str, Tensor]) -> Tensor:
    return loss(values["first"][0], values["second"][0], values["scale"])


def biased(loss: Any, values: dict[str, Tensor]) -> Tensor:
    return loss(values["first"][0], values["second"][0], values["scale"], values["bias"], output_dict=True)[
        "contrastive_loss"
    ]


def banked(loss: Any, values: dict[str, Tensor]) -> Tensor:
    """Sum the losses of three steps; the second writes past the bank's end, and the third starts from its beginning."""
    loss.double()
    bank = loss.memory_bank.bank if hasattr(loss.memory_bank, "bank") else loss.memory_bank.keys
    bank[:11] = values["bank"].detach()
    return torch.stack([loss(*step) for step in zip(values["first"], values["second"], strict=True)]).sum()


def supervised(**options: Tensor) -> Call:
    return lambda loss, values: loss(values["features"], **options)


def single(loss: Any, values: dict[str, Tensor]) -> Tensor:
    """Compute the loss with one view of each sample, so that some have no positive."""
    return loss(values["features"][:, :1], LABELS)


def weigh(first: Tensor, second: Tensor) -> Tensor:
    """Weights that tell the views apart, with gradients."""
    return 2 - torch.softmax((first * second).sum(1) + first[:, 0], 0)


# By library and case: their module and class, ours, the arguments, and the call.
CASES: dict[str, dict[str, tuple[str, type, dict[str, Any], Call]]] = {
    "open_clip": {
        "clip": ("open_clip.loss.ClipLoss", nn.CLIPLoss, {"cache_labels": True}, scaled),
        "clip_bias": ("open_clip.loss.ClipLoss", nn.CLIPLoss, {}, biased),
        "siglip": ("open_clip.loss.SigLipLoss", nn.SigLIPLoss, {}, biased),
    },
    "lightly": {
        "nt_xent": ("lightly.loss.NTXentLoss", nn.NTXentLoss, {}, pairs),
        "nt_xent_bank": ("lightly.loss.NTXentLoss", nn.NTXentLoss, {"memory_bank_size": (11, 8)}, banked),
        "dcl": ("lightly.loss.DCLLoss", nn.DecoupledContrastiveLoss, {}, pairs),
        "dcl_weighted": (
            "lightly.loss.DCLLoss",
            nn.DecoupledContrastiveLoss,
            {"temperature": 0.3, "weight_fn": weigh},
            pairs,
        ),
    },
    "sup_contrast": {
        f"{mode}_{name}": ("losses.SupConLoss", nn.SupConLoss, {"temperature": 0.2, "contrast_mode": mode}, call)
        for mode in ("all", "one")
        for name, call in {
            "labels": supervised(labels=LABELS),
            "mask": supervised(mask=MASK),
            "neither": supervised(),
            "single": single,
        }.items()
    },
}
NAMES = [(library, case) for library, cases in CASES.items() for case in cases]


def results(
    loss: Any, call: Callable[[Any, dict[str, Tensor]], Tensor], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The loss, and its gradients in the inputs that it depends on."""
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    total = call(loss, values)
    gradients = grad(total, [*values.values()], allow_unused=True)
    found = {f"grad_{name}": one for name, one in zip(values, gradients, strict=True) if one is not None}
    return {"loss": total.detach(), **found}


def original(library: str, case: str) -> dict[str, Tensor]:
    path, _, options, call = CASES[library][case]
    module, _, name = path.rpartition(".")
    return results(getattr(importlib.import_module(module), name)(**options), call, inputs())


def ours(library: str, case: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    _, loss, options, call = CASES[library][case]
    return results(loss(**options), call, values)


# --- The tests ---


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("library", "case"), NAMES)
def test_as_it_was(golden, library, case):
    tensors = golden(f"{library}.losses").tensors

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    assert_same(ours(library, case, below("inputs.")), below(f"{case}."))


@pytest.mark.parametrize(("library", "case"), NAMES)
def test_as_it_is(library, case):
    pytest.importorskip(CASES[library][case][0].rpartition(".")[0], exc_type=ImportError)
    assert_same(ours(library, case, inputs()), original(library, case))


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_as_they_are(processes):
    for library in ("open_clip", "lightly"):
        pytest.importorskip(f"{library}.loss", exc_type=ImportError)
    program = Path(__file__).with_name("losses_of_ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*torchrun, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def write() -> None:
    for library, cases in CASES.items():
        package = {"open_clip": "open_clip_torch", "sup_contrast": None}.get(library, library)
        source = f"{package} {importlib.metadata.version(package)}" if package else "HobbitLong/SupContrast"
        tensors = {f"inputs.{name}": value for name, value in inputs().items()}
        for case in cases:
            tensors |= {f"{case}.{name}": value for name, value in original(library, case).items()}
        folder = Path(__file__).parent
        save_file(tensors, folder / f"{library}.losses.safetensors", {"source": source, "torch": torch.__version__})


if __name__ == "__main__":
    sys.exit(write())
