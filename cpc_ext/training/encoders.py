"""What runs that learn an encoder share: which encoders there are, their file, and their linear probe.

From names on the command line to arguments, from a trained encoder to encoder.safetensors and its accuracies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from cpc_ext import __version__
from cpc_ext.data import Dataset, PatchView, SimCLRView
from cpc_ext.models import ResNetV2Encoder
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.config import RunConfig
from cpc_ext.training.probe import encode, linear_probe
from cpc_ext.training.run_dir import RunDir

__all__ = ["ENCODERS", "encoder_arguments", "probe_accuracies", "save_encoder"]

# Arguments of ResNetV2Encoder by the name on the command line.
ENCODERS: dict[str, dict[str, Any]] = {
    "resnet-small": {"blocks": (1, 1, 1), "channels": (32, 64, 128), "stem_channels": 32, "stem": "strided"},
    "resnet14": {"depth": 14},
    "resnet28": {"depth": 28},
    "resnet41": {"depth": 41},
    "resnet92": {"depth": 92},
    "resnet143": {"depth": 143},
    "resnet18": {"depth": 18},
    "resnet34": {"depth": 34},
    "resnet50": {"depth": 50},
    "resnet101": {"depth": 101},
    "resnet152": {"depth": 152},
}


def encoder_arguments(name: str, *, norm: str, in_channels: int, stem: str) -> dict[str, Any]:
    """Arguments of :class:`ResNetV2Encoder` for an encoder of that name; some have a stem of their own."""
    return {"in_channels": in_channels, "norm": norm, "stem": stem, **ENCODERS[name]}


def probe_accuracies(
    dataset: Dataset, device: torch.device, features: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, float]:
    """Accuracies NAME_accuracy of linear probes, and chance_accuracy, that of always naming the commonest class.

    features: of every encoder by its probe's name: uint8 [B, C, H, W] on the device → [B, D]. Nothing is returned where
    the data set has no labels to train and test with.
    """
    train, test = dataset.train, dataset.test
    if train is None or test is None or train.labels is None or test.labels is None:
        return {}
    results = {}
    for name, encoded in features.items():
        results[f"{name}_accuracy"] = linear_probe(
            encode(train, encoded, device),
            torch.from_numpy(train.labels),
            encode(test, encoded, device),
            torch.from_numpy(test.labels),
            classes=len(dataset.classes),
        ).accuracy
    counts = torch.bincount(torch.from_numpy(test.labels), minlength=len(dataset.classes))
    results["chance_accuracy"] = counts.max().item() / counts.sum().item()
    return results


def save_encoder(
    run: RunDir, encoder: ResNetV2Encoder, arguments: dict[str, Any], view: PatchView | SimCLRView, config: RunConfig
) -> None:
    """Write the encoder's weights, with what is needed to build it and to feed it in the file's header.

    OSError where that fails.
    """
    weights = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    metadata = {
        "format": "pt",
        "cpc_ext": __version__,
        "encoder": json.dumps(arguments),
        "view": json.dumps({name: value for name, value in asdict(view).items() if name != "dtype"}),
        "config": json.dumps(config.model_dump(mode="json")),
    }
    with atomic_file(run.encoder) as file:
        file.write(to_safetensors(weights, metadata))
