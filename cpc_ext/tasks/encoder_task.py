"""What runs that learn an encoder share: its file and its linear probe.

From a trained encoder to encoder.safetensors, and to its accuracies beside those of the same encoder untrained, whose
weights the seed brings back.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext import __version__
from cpc_ext.data import Dataset, PatchView, SimCLRView
from cpc_ext.measures.probe import encode, linear_probe
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.tasks.encoder_names import EncoderSpec
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.config import RunConfig
from cpc_ext.training.precision import autocast
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.safetensors_file import write_safetensors
from cpc_ext.training.task import Task

__all__ = ["EncoderTask", "save_encoder"]


# What those who feed an encoder have no use for in a view.
_OF_TRAINING = ("dtype", "augmentation")


class EncoderTask(Task):
    """A model whose encoder is judged by a linear probe.

    Attributes of subclasses:
        _config: of the run.
        _dataset: with the labels that the probe is trained and tested with, if any.
        _device: where features are computed.
    """

    model: EncoderModel
    _config: RunConfig
    _dataset: Dataset
    _device: torch.device

    @property
    def config(self) -> RunConfig:
        """The run's config."""
        return self._config

    @abstractmethod
    def _build(self) -> EncoderModel:
        """The model with the initial weights of the config's seed."""

    @abstractmethod
    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the model's encoder makes of images, differentiable in its weights.

        Args:
            model: one of this task's.
            images: uint8 [B, C, H, W] on the device.
            generator: on the CPU, of random crops and flips; None takes the central crop.

        Returns:
            Encodings of the patches, floating [B, D, rows, cols]; of a model of whole images [B, D, 1, 1].
        """

    @torch.no_grad()
    def encodings(self, model: EncoderModel, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device → encodings of the central crop's patches, float32 [B, D, rows, cols]."""
        was_training = model.training
        model.eval()
        with autocast(self._device, self._config.compute.precision):
            encodings = self.encode(model, images)
        model.train(was_training)
        return encodings.float()

    def modules(self, stacks: int) -> int | Sequence[int]:
        """What the stacks of the encoder are probed as, see :func:`module_starts`; by default each by itself."""
        return stacks

    def features(self, model: EncoderModel, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the device → what a probe sees of them, float32 [B, D]: the mean over the patches."""
        return self.encodings(model, images).mean((2, 3))

    def description(self) -> dict[str, Any]:
        """What the images were like, for those who feed the encoder without having them: shape and statistics."""
        dataset = self._dataset
        return {
            "image_shape": list(dataset.image_shape),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "gray_mean": dataset.gray_mean,
            "gray_std": dataset.gray_std,
        }

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
                encode(images, partial(self.features, model), self._device) for images in (train, test)
            )
            train_labels, test_labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
            results[f"{name}_accuracy"] = linear_probe(
                train_features, train_labels, test_features, test_labels, classes=classes
            ).accuracy
        counts = torch.bincount(torch.from_numpy(test.labels), minlength=classes)
        results["chance_accuracy"] = counts.max().item() / counts.sum().item()
        return results


def save_encoder(
    run: RunDir, encoder: nn.Module, spec: EncoderSpec, view: PatchView | SimCLRView, config: RunConfig
) -> None:
    """Write the encoder's weights, with what is needed to build it and to feed it in the file's header.

    "class" there is its name in :mod:`cpc_ext.models`, "encoder" that class's keyword arguments as JSON.

    OSError where that fails.
    """
    weights = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    metadata = {
        "format": "pt",
        "cpc_ext": __version__,
        "class": spec.kind.__name__,
        "encoder": json.dumps(spec.arguments),
        "view": json.dumps({name: value for name, value in asdict(view).items() if name not in _OF_TRAINING}),
        "config": json.dumps(config.model_dump(mode="json")),
    }
    with atomic_file(run.encoder) as file:
        write_safetensors(file, weights, metadata)
