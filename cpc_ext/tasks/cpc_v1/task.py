"""The task of training CPC v1: grey or colour crops as grids of patches, contrastive loss, linear probe."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cpc_ext.data import Dataset, PatchView
from cpc_ext.models import CPC, GatedPixelCNNContext
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput
from cpc_ext.tasks.cpc_v1.options import CPCConfig
from cpc_ext.tasks.encoder_task import EncoderTask, guessing
from cpc_ext.tasks.patches import center_or_random, patch_encoder, patch_view, save_patch_figures
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir

__all__ = ["TASK", "CPCv1Task"]


class CPCv1Task(EncoderTask):
    """CPC v1 (van den Oord et al. 2018, arXiv 1807.03748) on a data set.

    Raises:
        ValueError: images smaller than the crop.
    """

    model: CPC
    _config: CPCConfig
    _view: PatchView

    def __init__(self, config: CPCConfig, dataset: Dataset, device: torch.device) -> None:
        super().__init__(config, dataset, device, patch_view(config, dataset), patch_encoder(config, dataset))

    def _build(self) -> CPC:
        options = self._config.cpc
        encoder = self._encoder_spec.build(self._view.patch_size)
        return CPC(
            encoder,
            GatedPixelCNNContext(encoder.out_channels, options.context_layers),
            pred_steps=options.pred_steps,
            pred_directions=options.pred_directions,
            skip=options.skip,
            neg_samples=options.neg_samples,
            gather_negatives=options.gather_negatives,
        )

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        patches = self._view.random(images, streams.views, share=streams.share)
        output: GridInfoNCEOutput = self.model(patches, generator=streams.negatives)
        return {"loss": output.loss, "accuracy": output.accuracy, "mutual_information": output.mutual_information}

    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return model.encode(center_or_random(self._view, images, generator))

    @property
    def guess(self) -> dict[str, float]:
        return guessing(*self._config.keys_by_step(self.contrasted_images))

    def _save_figures(self, run: RunDir) -> None:
        self._save_curves(run, loss="InfoNCE loss")
        encodings = partial(self.encodings, self.model)
        save_patch_figures(run, self._view, self._shown, encodings, self._config.compute.seed)


TASK = CPCv1Task
