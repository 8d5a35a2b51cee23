"""What runs that learn an encoder share: which encoders there are, their file, and their linear probe.

From names on the command line to arguments, from a trained encoder to encoder.safetensors and its accuracies, beside
those of the same encoder untrained, whose weights the seed brings back.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cpc_ext import __version__
from cpc_ext.data import Dataset, PatchView, SimCLRView
from cpc_ext.models import ResNetV2Encoder
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.config import RunConfig
from cpc_ext.training.probe import encode, linear_probe
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.task import Task

__all__ = ["ENCODERS", "EncoderTask", "encoder_arguments", "save_encoder"]

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


class EncoderTask(Task):
    """A model whose encoder is judged by a linear probe.

    Attributes of subclasses:
        _dataset: with the labels that the probe is trained and tested with, if any.
        _device: where features are computed.
    """

    _dataset: Dataset
    _device: torch.device

    @abstractmethod
    def _build(self) -> nn.Module:
        """The model with the initial weights of the config's seed."""

    @abstractmethod
    def _features(self, model: nn.Module, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device → what the probe sees of them, [B, D]."""

    def evaluate(self) -> dict[str, float]:
        """Accuracies of the probe, on trained and untrained encoder, and of always naming the commonest class.

        Nothing where the data set has no labels to train and test it with.
        """
        train, test = self._dataset.train, self._dataset.test
        if train is None or test is None or train.labels is None or test.labels is None:
            return {}
        classes = len(self._dataset.classes)
        results = {}
        for name, model in (("probe", self.model), ("untrained_probe", self._build())):
            train_features, test_features = (
                encode(images, lambda batch, m=model: self._features(m, batch), self._device)
                for images in (train, test)
            )
            train_labels, test_labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
            results[f"{name}_accuracy"] = linear_probe(
                train_features, train_labels, test_features, test_labels, classes=classes
            ).accuracy
        counts = torch.bincount(torch.from_numpy(test.labels), minlength=classes)
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
