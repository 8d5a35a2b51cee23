"""The task of training SimCLR: two random views of whole images, NT-Xent, linear probe."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext import figures
from cpc_ext.data import Dataset, SimCLRView
from cpc_ext.models import SimCLR
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.nn import NTXentOutput
from cpc_ext.tasks.encoder_names import encoder_spec
from cpc_ext.tasks.encoder_task import EncoderTask, guessing
from cpc_ext.tasks.simclr.options import SimCLRConfig
from cpc_ext.training.precision import patch_dtype
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir

__all__ = ["TASK", "SimCLRTask"]

_FIGURE_INPUTS = 6


class SimCLRTask(EncoderTask):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709) on a data set.

    Raises:
        ValueError: a blur that does not fit the views.
    """

    model: SimCLR
    _config: SimCLRConfig
    _view: SimCLRView

    def __init__(self, config: SimCLRConfig, dataset: Dataset, device: torch.device) -> None:
        options = config.simclr
        view = SimCLRView.of(
            dataset,
            options.view_size,
            min_area=options.min_crop_area,
            blur_kernel=options.blur_kernel,
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

    def _build(self) -> SimCLR:
        options = self._config.simclr
        return SimCLR(
            self._encoder_spec.build(options.view_size),
            projection_channels=options.projection_channels,
            temperature=options.temperature,
            gather_negatives=options.gather_negatives,
        )

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

    def _save_figures(self, run: RunDir) -> None:
        self._save_curves(run, guessing(2 * self._config.optimization.batch_size - 1), loss="NT-Xent loss")
        self._save_inputs(run)

    def _save_inputs(self, run: RunDir) -> None:
        """Images, each above its two views."""
        images, _ = self._shown(_FIGURE_INPUTS)
        plain = SimCLRView(self._view.size, min_area=self._view.min_area, blur_kernel=self._view.blur_kernel)
        views = plain.random_pair(images, torch.Generator().manual_seed(self._config.compute.seed))
        pixels = torch.cat([plain.center(images), *views]) * 255
        figures.save_images(run.path / "inputs.png", pixels.round().byte().cpu().numpy(), columns=len(images))


TASK = SimCLRTask
