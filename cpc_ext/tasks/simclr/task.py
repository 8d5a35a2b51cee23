"""The task of training SimCLR: two random views of whole images, NT-Xent, linear probe.

It is judged as CPC is, by a probe on features averaged over space, against the same encoder untrained, whose weights
the seed brings back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpc_ext import figures
from cpc_ext.data import Dataset, ImageFetcher, SimCLRView
from cpc_ext.data.spread import spread
from cpc_ext.models import SimCLR
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.nn import NTXentOutput
from cpc_ext.tasks.encoder_names import EncoderSpec, encoder_spec
from cpc_ext.tasks.encoder_task import EncoderTask, save_encoder
from cpc_ext.tasks.simclr.options import SimCLRConfig
from cpc_ext.training.precision import patch_dtype
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics

__all__ = ["TASK", "SimCLRTask"]

_FIGURE_INPUTS = 6


class SimCLRTask(EncoderTask):
    """SimCLR on a data set.

    Raises:
        ValueError: a blur that does not fit the views.
    """

    _config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, dataset: Dataset, device: torch.device) -> None:
        self._config = config
        self._dataset = dataset
        self._device = device
        self.images = dataset.pretrain
        self._view = SimCLRView.of(
            dataset,
            config.simclr.view_size,
            min_area=config.simclr.min_crop_area,
            blur_kernel=config.simclr.blur_kernel,
            dtype=patch_dtype(config.compute.precision),
            channels_last=config.compute.channels_last,
        )
        self.model = self._build()

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, enabled=False):  # Views are float32 until they are finished.
            views = self._view.random_pair(images, streams.views, share=streams.share)
        output: NTXentOutput = self.model(views)
        return output._asdict()

    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.autocast(self._device.type, enabled=False):
            # Colours stay, which tell classes apart; the paper, too, only crops and mirrors where there are labels.
            view = self._view.center(images) if generator is None else self._view.cropping().random(images, generator)
        return model.encode(view)[..., None, None]

    def save(self, run: RunDir) -> None:
        save_encoder(run, self.model.encoder, self._encoder_spec(), self._view, self._config)
        metrics = read_metrics(run.metrics, having=("loss", "accuracy"))
        if metrics:
            keys = 2 * self._config.optimization.batch_size - 1
            guessing = {"loss": math.log(keys), "accuracy": 1 / keys}
            figures.save(run.path / "curves.png", figures.curves(metrics, guessing))
        self._save_inputs(run)

    def _save_inputs(self, run: RunDir) -> None:
        """Images, each above its two views."""
        shown = self._dataset.pretrain if self._dataset.test is None else self._dataset.test
        images = ImageFetcher(shown, self._device, resident=False)(spread(_FIGURE_INPUTS, len(shown)))
        plain = SimCLRView(self._view.size, min_area=self._view.min_area, blur_kernel=self._view.blur_kernel)
        views = plain.random_pair(images, torch.Generator().manual_seed(self._config.compute.seed))
        pixels = torch.cat([plain.center(images), *views]) * 255
        figures.save_images(run.path / "inputs.png", pixels.round().byte().cpu().numpy(), columns=len(images))

    def _build(self) -> SimCLR:
        """The model with the initial weights of the config's seed."""
        options = self._config.simclr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.compute.seed)
            model = SimCLR(
                self._encoder_spec().build(options.view_size),
                projection_channels=options.projection_channels,
                temperature=options.temperature,
                gather_negatives=options.gather_negatives,
            )
        if self._config.compute.channels_last:
            # PyTorch declares it beside a device only.
            model.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self._device)

    def _encoder_spec(self) -> EncoderSpec:
        options = self._config.simclr
        return encoder_spec(
            options.encoder,
            norm=options.norm,
            in_channels=self._dataset.image_shape[0],
            # Small images keep all their pixels, as in the paper's CIFAR-10 experiments.
            stem="cifar" if options.view_size <= 40 else "imagenet",
            patch_size=options.view_size,
        )


TASK = SimCLRTask
