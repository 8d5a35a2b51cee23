"""The common part of the tasks that train an image encoder: initial weights, saved file, curves and linear probe.

The trained encoder is saved as encoder.safetensors. The probe also measures the same encoder untrained, whose weights
follow from the seed.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpc_ext import __version__, figures
from cpc_ext.data import Dataset, ImageFetcher, ImageSet, PatchView, SimCLRView
from cpc_ext.data.spread import spread
from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.measures.probe import encode, linear_probe
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.tasks.encoder_names import EncoderSpec
from cpc_ext.tasks.encoder_options import ContrastSection, EncoderConfig
from cpc_ext.tasks.online_probe import RANK, ImageProbe, probe_curve
from cpc_ext.tasks.require_pixels import require_pixels
from cpc_ext.tasks.trouble import trouble
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.precision import autocast
from cpc_ext.training.random_streams import seeded
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.safetensors_file import write_safetensors
from cpc_ext.training.task import Task

__all__ = ["EncoderTask", "guessing"]

# Fields of a view that matter only for training, and are not saved with the encoder.
_OF_TRAINING = ("dtype", "augmentation")
# Number of images by which runs that learn nothing are detected.
_LOOKED_AT = 256


class EncoderTask(Task):
    """The task of training a model whose encoder is judged by a linear probe.

    Args:
        config: config of the run.
        dataset: data set, with the labels that the probe is trained and tested with, if any.
        device: device of the model.
        view: turns images into inputs of the encoder.
        encoder: specification of the encoder.
    """

    model: EncoderModel
    examples: ImageSet

    def __init__(
        self,
        config: EncoderConfig,
        dataset: Dataset,
        device: torch.device,
        view: PatchView | SimCLRView,
        encoder: EncoderSpec,
    ) -> None:
        require_pixels(dataset)
        self._config = config
        self._dataset = dataset
        self._device = device
        self._view = view
        self._encoder_spec = encoder
        self.examples = dataset.pretrain
        self.observe_every = config.probe.probe_every
        self.observe_start = self.observe_every is not None
        self._probe: ImageProbe | None = None
        self.model = self.initial_model()

    @property
    def config(self) -> EncoderConfig:
        """The run's config."""
        return self._config

    @abstractmethod
    def _build(self) -> EncoderModel:
        """Build a new model on the CPU; PyTorch's default generator draws the weights."""

    @abstractmethod
    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images, differentiably in the weights of the encoder.

        Args:
            model: a model of this task.
            images: uint8 [B, C, H, W] on the device.
            generator: CPU generator of random crops and flips; None takes the central crop.

        Returns:
            Encodings of the patches, floating [B, D, rows, cols]; of a model of whole images [B, D, 1, 1].
        """

    @abstractmethod
    def _save_figures(self, run: RunDir) -> None:
        """Draw the curves of the run and the inputs of the model. OSError if writing fails."""

    def initial_model(self) -> EncoderModel:
        """Build the model with the initial weights of the config's seed."""
        with seeded(self._config.compute.seed):
            model = self._build()
        if self._config.compute.channels_last:
            # Only the encoder: the other four-dimensional parameters are not filters over images.
            # PyTorch's annotations allow memory_format only beside a device.
            model.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self._device)

    def thaw(self, model: EncoderModel) -> None:
        """Make the whole encoder of a model of this task trainable, including modules that the run itself freezes."""

    @torch.no_grad()
    def encodings(self, model: EncoderModel, images: Tensor) -> Tensor:
        """Encode the central crops of images, uint8 [B, C, H, W] on the device, as float32 [B, D, rows, cols]."""
        was_training = model.training
        model.eval()
        try:
            with autocast(self._device, self._config.compute.precision):
                encodings = self.encode(model, images)
        finally:
            model.train(was_training)
        return encodings.float()

    def modules(self, stacks: int) -> int | Sequence[int]:
        """Return how probes group the stacks into modules, see :func:`module_starts`; by default one per stack."""
        return stacks

    def features(self, model: EncoderModel, images: Tensor) -> Tensor:
        """Return a probe's features of uint8 images [B, C, H, W] on the device: means over patches, float32 [B, D]."""
        return self.encodings(model, images).mean((2, 3))

    def description(self) -> dict[str, Any]:
        """Return shape and statistics of the images, with which the encoder can be used without the data set."""
        dataset = self._dataset
        return {
            "image_shape": list(dataset.image_shape),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "gray_mean": dataset.gray_mean,
            "gray_std": dataset.gray_std,
        }

    def prepare(self, ranks: Ranks, *, resumed: bool) -> None:
        if self.observe_every is not None:
            self._probe = ImageProbe(self._dataset, self._device)

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        return {} if self._probe is None else self._probe.found(partial(self.features, self.model))

    def trouble(self, means: dict[str, float]) -> str | None:
        chosen = spread(_LOOKED_AT, len(self.examples))
        features = encode(self.examples, partial(self.features, self.model), self._device, chosen=chosen)
        return trouble(means, self.guess, features, self._config)

    @property
    def contrasted_images(self) -> int:
        """Number of images whose encodings are contrasted with each other."""
        section = self._config.encoder_section
        assert isinstance(section, ContrastSection)
        return self.contrasted(self._config.optimization.batch_size, section.gather_negatives)

    @property
    @abstractmethod
    def guess(self) -> dict[str, float]:
        """Loss and accuracy of guessing."""

    def evaluate(self) -> dict[str, float]:
        """Return the probe's accuracies on trained and untrained encoder, and that of naming the commonest class.

        The effective ranks of the probe's training features are among the results. The result is empty if the data set
        has no labels to train and test the probe with.
        """
        train, test = self._dataset.train, self._dataset.test
        if train is None or test is None or train.labels is None or test.labels is None:
            return {}
        classes = len(self._dataset.classes)
        most = self._config.probe.probe_images
        labelled = spread(len(train) if most is None else most, len(train))
        results = {}
        for name, model in (("probe", self.model), ("untrained_probe", self.initial_model())):
            features = partial(self.features, model)
            train_features = encode(train, features, self._device, chosen=labelled)
            test_features = encode(test, features, self._device)
            train_labels, test_labels = torch.from_numpy(train.labels[labelled]), torch.from_numpy(test.labels)
            results[f"{name}_accuracy"] = linear_probe(
                train_features, train_labels, test_features, test_labels, classes=classes
            ).accuracy
            results[RANK if model is self.model else f"untrained_{RANK}"] = effective_rank(train_features)
        counts = torch.bincount(torch.from_numpy(test.labels), minlength=classes)
        results["chance_accuracy"] = counts.max().item() / counts.sum().item()
        return results

    def save(self, run: RunDir) -> None:
        """Write the figures, and the encoder's weights in a file whose header says how to build and use the encoder.

        The header's "class" is the class's name in :mod:`cpc_ext.models`, "encoder" its keyword arguments as JSON. If
        modules follow the last one that the run trained, "modules" is the number of modules up to that one; those that
        follow have the weights that they had at the run's start.
        """
        weights = {name: value.contiguous() for name, value in self.model.encoder.state_dict().items()}
        view = {name: value for name, value in asdict(self._view).items() if name not in _OF_TRAINING}
        metadata = {
            "format": "pt",
            "cpc_ext": __version__,
            "class": self._encoder_spec.kind.__name__,
            "encoder": json.dumps(self._encoder_spec.arguments),
            "view": json.dumps(view),
            "config": json.dumps(self._config.model_dump(mode="json")),
        }
        if self._config.trained_modules is not None:
            metadata["modules"] = str(self._config.trained_modules)
        with atomic_file(run.encoder) as file:
            write_safetensors(file, weights, metadata)
        self._save_figures(run)

    def _save_curves(self, run: RunDir, *, loss: str) -> None:
        """Draw the logged contrastive loss, labelled ``loss``, and accuracy beside those of guessing, and the probe."""
        metrics = read_metrics(run.metrics, having=("loss", "accuracy"))
        if metrics:
            probe = probe_curve(run.metrics, self._probe)
            figure = figures.curves(metrics, self.guess, loss=loss, accuracy="contrastive accuracy", probe=probe)
            figures.save(run.path / "curves.png", figure)

    def _shown(self, count: int) -> tuple[Tensor, np.ndarray | None]:
        """Return at most ``count`` images for a figure, spread over the test images, or without any the training ones.

        Returns:
            uint8 [N, C, H, W] on the device, and labels [N], or None without any.
        """
        shown = self._dataset.pretrain if self._dataset.test is None else self._dataset.test
        chosen = spread(count, len(shown))
        images = ImageFetcher(shown, self._device, resident=False)(chosen)
        return images, None if shown.labels is None else shown.labels[chosen]


def guessing(*keys: int, weights: Sequence[float] | None = None) -> dict[str, float]:
    """Return loss and accuracy of uniform guessing, averaged over predictions with these numbers of keys.

    weights: weights of the predictions in the mean. Default: equal ones.
    """
    weights = [1.0] * len(keys) if weights is None else weights
    return {
        "loss": sum(weight * math.log(count) for count, weight in zip(keys, weights, strict=True)) / sum(weights),
        "accuracy": sum(weight / count for count, weight in zip(keys, weights, strict=True)) / sum(weights),
    }
