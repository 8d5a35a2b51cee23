"""The common part of the tasks with two views: views of whole images, their encoder and figures."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext import figures
from cpc_ext.data import Dataset, SimCLRView
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.tasks.encoder_names import encoder_spec
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.tasks.two_view_options import TwoViewConfig
from cpc_ext.training.precision import patch_dtype
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir

__all__ = ["TwoViewTask"]

_FIGURE_INPUTS = 6


class TwoViewTask(EncoderTask):
    """The task of training a model of two views on a data set.

    Attributes:
        loss_name: name of the loss in figures.

    Raises:
        ValueError: a blur that does not fit the views.
    """

    loss_name: str
    _config: TwoViewConfig
    _view: SimCLRView

    def __init__(self, config: TwoViewConfig, dataset: Dataset, device: torch.device) -> None:
        options = config.encoder_section
        view = SimCLRView.of(
            dataset,
            options.view_size,
            **options.view,
            dtype=patch_dtype(config.compute.precision),
            channels_last=config.compute.channels_last,
        )
        encoder = encoder_spec(
            options.encoder,
            norm=options.norm,
            in_channels=dataset.image_shape[0],
            # Small images keep all their pixels, as in the paper's CIFAR-10 experiments.
            stem="cifar" if options.view_size <= 40 else "imagenet",
            patch_size=options.view_size,
        )
        super().__init__(config, dataset, device, view, encoder)

    def views(self, images: Tensor, streams: RandomStreams) -> Tensor:
        """Draw two random views of a batch, [2, B, C, H, W]."""
        with torch.autocast(self._device.type, enabled=False):  # Views are float32 until they are finished.
            return self._view.random_pair(images, streams.views, share=streams.share)

    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.autocast(self._device.type, enabled=False):
            # Colours are kept, as they tell classes apart; with labels, the paper too only crops and mirrors.
            view = self._view.center(images) if generator is None else self._view.cropping().random(images, generator)
        return model.encode(view)[..., None, None]

    def _save_figures(self, run: RunDir) -> None:
        self._save_curves(run, loss=self.loss_name)
        self._save_inputs(run)

    def _save_inputs(self, run: RunDir) -> None:
        """Draw some images, each above its two views."""
        images, _ = self._shown(_FIGURE_INPUTS)
        plain = SimCLRView(self._view.size, **self._config.encoder_section.view | {"center_scale": 1.0})
        views = plain.random_pair(images, torch.Generator().manual_seed(self._config.compute.seed))
        pixels = torch.cat([plain.center(images), *views]) * 255
        figures.save_images(run.path / "inputs.png", pixels.round().byte().cpu().numpy(), columns=len(images))
