"""The task of training a model of pixels on whole images, with likelihoods in bits per dimension and samples.

The model is judged by the bits that it needs for a value of a held-out image, compared with the best model that knows
only the value's position and colour.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpc_ext import __version__, figures, models
from cpc_ext.data import Dataset, ImageFetcher, ImageSet
from cpc_ext.data.on_device import send
from cpc_ext.data.spread import spread
from cpc_ext.measures.pixel_histogram import static_histogram_bits_per_dim
from cpc_ext.models.pixels.pixel_model import PixelModel
from cpc_ext.models.pixels.pixel_sampler import IMAGE_LEVELS
from cpc_ext.tasks.pixel_options import PixelConfig
from cpc_ext.tasks.require_pixels import require_pixels
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.precision import autocast
from cpc_ext.training.random_streams import RandomStreams, seeded
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.safetensors_file import write_safetensors
from cpc_ext.training.task import Task
from cpc_ext.training.weight_average import WeightAverage

__all__ = ["PixelTask", "build_pixel_model", "shown"]

# Test images that are evaluated during training; the final evaluation takes all of them.
_HELD_OUT_IMAGES = 200
_SAMPLES = 16


def build_pixel_model(description: dict[str, Any]) -> PixelModel:
    """Build the model that a :meth:`PixelTask.description` describes; its weights are yet to be loaded.

    KeyError, TypeError or ValueError if it is no such description.
    """
    model = getattr(models, description["model"], None)
    if not (isinstance(model, type) and issubclass(model, PixelModel)):
        raise ValueError(f"model: expected one of pixels, got {description['model']}")
    return model(**description["arguments"])


def shown(model: PixelModel, images: np.ndarray) -> np.ndarray:
    """Return images as figures show them, with levels scaled to uint8 from black to white: [N, C, H, W], C 1 or 3.

    Of codes with another number of channels, the first channel is shown.
    """
    if model.levels != IMAGE_LEVELS:
        images = (images.astype(np.int64) * 255 // (model.levels - 1)).astype(np.uint8)
    return images if images.shape[1] in (1, 3) else images[:, :1]


class PixelTask(Task):
    """The task of training a model of pixels on a data set.

    Raises:
        ValueError: no held-out images, no labels for a model that takes classes, images of a size that the model does
            not take, codes beyond the levels, or channels that are no multiple of the colours.
    """

    model: PixelModel
    examples: ImageSet

    def __init__(self, config: PixelConfig, dataset: Dataset, device: torch.device) -> None:
        if dataset.test is None:
            raise ValueError(f"--dataset {dataset.name} has no test images to measure the model on")
        self.examples = dataset.pretrain
        if config.pixelcnn.class_conditional:
            if self.examples.labels is None and dataset.train is not None:
                self.examples = dataset.train
            if self.examples.labels is None or dataset.test.labels is None:
                raise ValueError(f"--class-conditional: the images of {dataset.name} have no labels")
        self.observe_every = config.pixelcnn.sample_every
        self._config = config
        self._dataset = dataset
        self._test = dataset.test
        self._device = device
        self._check_options()
        self._check_values()
        with seeded(config.compute.seed):
            self.model = build_pixel_model(self.description()).to(device)
        try:
            self.model.check_size(*dataset.image_shape[1:])
        except ValueError as error:
            raise ValueError(f"--model {config.model} on {dataset.name}: {error}") from None
        self._initialize()
        self._average = self._new_average()

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        if self._config.pixelcnn.mirror:
            flip = torch.rand(streams.share.whole(len(images)), generator=streams.views) < 0.5
            flip = send(streams.share.part(flip), images.device)
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
        bits = self.model.bits_per_dim(images, labels if self._config.pixelcnn.class_conditional else None)
        return {"loss": bits * math.log(2), "bits_per_dim": bits}

    def start(self, weights: dict[str, Tensor]) -> None:
        super().start(weights)
        self._average = self._new_average()

    def updated(self) -> None:
        if self._average is not None:
            self._average.update(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._average is not None:
            self._average.load_state_dict(state)

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        """Return bits per dimension of some held-out images, and write samples as samples/step-NUMBER.png."""
        bits = self._bits_per_dim(self._test, _HELD_OUT_IMAGES)
        run.samples.mkdir(exist_ok=True)
        figures.save_images(run.sample(step), shown(self.model, self._samples()))
        return {"heldout_bits_per_dim": bits}

    def evaluate(self) -> dict[str, float]:
        """Return bits per dimension: held-out images by the model and by static histograms, as many training images."""
        return {
            "bits_per_dim": self._bits_per_dim(self._test, len(self._test)),
            "train_bits_per_dim": self._bits_per_dim(self.examples, len(self._test)),
            "static_histogram_bits_per_dim": self._baseline(),
        }

    def save(self, run: RunDir) -> None:
        metadata = {
            "format": "pt",
            "cpc_ext": __version__,
            "description": json.dumps(self.description()),
            "config": json.dumps(self._config.model_dump(mode="json")),
        }
        weights = {name: value.contiguous() for name, value in self._evaluated.state_dict().items()}
        with atomic_file(run.model) as file:
            write_safetensors(file, weights, metadata)
        metrics = read_metrics(run.metrics)
        if metrics:
            figures.save(run.path / "curves.png", figures.likelihood_curves(metrics, self._baseline()))
        figures.save_images(run.path / "samples.png", shown(self.model, self._samples()))

    def description(self) -> dict[str, Any]:
        """Return name and arguments of the model, the images' shape, and the names of the classes that it takes."""
        name, arguments = self._model()
        shape = self._dataset.image_shape
        return {
            "model": name,
            "arguments": {"in_channels": shape[0], **arguments},
            "image_shape": list(shape),
            "classes": list(self._dataset.classes) if self._config.pixelcnn.class_conditional else [],
        }

    @abstractmethod
    def _model(self) -> tuple[str, dict[str, Any]]:
        """Return the name of the model's class in :mod:`cpc_ext.models`, and its arguments but ``in_channels``."""

    def _check_options(self) -> None:
        """Raise ValueError if the options do not fit the images: channels are divided among the colours."""
        channels, colors = self._config.pixelcnn.hidden_channels, self._dataset.image_shape[0]
        if channels % colors:
            raise ValueError(f"--hidden-channels {channels} is not a multiple of the images' {colors} colours")

    def _check_values(self) -> None:
        """Raise ValueError if the images have values that the model does not take."""
        require_pixels(self._dataset)

    def _initialize(self) -> None:
        """Initialize the model from data, equally in all processes; by default there is nothing to do."""

    @property
    def _num_classes(self) -> int | None:
        """Number of classes that the model is conditioned on; None without conditioning."""
        return len(self._dataset.classes) if self._config.pixelcnn.class_conditional else None

    def _new_average(self) -> WeightAverage[PixelModel] | None:
        """Return a running average that starts from the current weights; None if the run keeps none."""
        decay = self._config.pixelcnn.ema_decay
        return WeightAverage(self.model, decay) if decay else None

    @property
    def _evaluated(self) -> PixelModel:
        """The model to evaluate, sample from and save: the running average if there is one."""
        return self.model if self._average is None else self._average.model

    @torch.no_grad()
    def _bits_per_dim(self, images: ImageSet, count: int) -> float:
        """Return the mean over ``count`` images that are spread over the set."""
        model = self._evaluated.eval()
        chosen = spread(count, len(images))
        count = len(chosen)
        fetch = ImageFetcher(images, self._device, resident=False)
        batch_size = self._config.optimization.batch_size
        nats = torch.zeros((), dtype=torch.float64)
        for start in range(0, count, batch_size):
            indices = chosen[start : start + batch_size]
            labels = fetch.labels(indices) if self._config.pixelcnn.class_conditional else None
            with autocast(self._device, self._config.compute.precision):
                # Each value is a sum of thousands of terms, so that their total is taken in double precision.
                nats += model.nats(fetch(indices), labels).cpu().double().sum()
        return nats.item() / (count * math.prod(self._dataset.image_shape) * math.log(2))

    def _baseline(self) -> float:
        return static_histogram_bits_per_dim(self.examples.images, self._test.images, self.model.levels)

    def _samples(self) -> np.ndarray:
        """Draw samples, uint8 [N, C, H, W], from the same noise each time; with classes, of each class in turn."""
        generator = torch.Generator(self._device).manual_seed(self._config.compute.seed)
        labels = None
        if self._config.pixelcnn.class_conditional:
            labels = torch.arange(_SAMPLES) % len(self._dataset.classes)
        return (
            self._evaluated.sample(_SAMPLES, self._dataset.image_shape[1:], labels=labels, generator=generator)
            .cpu()
            .numpy()
        )
