"""The task of training CPC v2: patches each augmented on its own, four directions, targets out of all of the batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cpc_ext.data import Dataset, PatchView
from cpc_ext.models import CPC, ResidualContext
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.nn import TargetInfoNCE
from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput
from cpc_ext.tasks.cpc_v2.options import CPCv2Config
from cpc_ext.tasks.encoder_task import EncoderTask, guessing
from cpc_ext.tasks.patches import center_or_random, patch_encoder, patch_view, save_patch_figures
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir

__all__ = ["TASK", "CPCv2Task"]


class CPCv2Task(EncoderTask):
    """CPC v2 (Hénaff et al. 2019, arXiv 1905.09272) on a data set.

    The loss is the mean over steps where the paper has their sum, which leaves Adam's updates nearly the same.

    Raises:
        ValueError: images smaller than the crop.
    """

    model: CPC
    _config: CPCv2Config
    _view: PatchView

    def __init__(self, config: CPCv2Config, dataset: Dataset, device: torch.device) -> None:
        super().__init__(config, dataset, device, patch_view(config, dataset), patch_encoder(config, dataset))

    def _build(self) -> CPC:
        options = self._config.cpc
        encoder = self._encoder_spec.build(self._view.patch_size)
        channels = encoder.out_channels
        as_bolts = options.variant == "lightning-bolts"
        contexts = [
            ResidualContext(
                channels,
                options.context_channels,
                options.context_layers,
                padding="lightning-bolts" if as_bolts else "zeros",
            )
            for _ in range(1 if options.shared_context else options.pred_directions)
        ]
        return CPC(
            encoder,
            contexts[0] if options.shared_context else contexts,
            TargetInfoNCE(
                channels,
                pred_steps=None if as_bolts else options.pred_steps,
                reduction="lightning-bolts" if as_bolts else "mean",
                pred_directions=options.pred_directions,
                skip=options.skip,
                target_channels=options.target_channels,
                scale=options.prediction_scale,
                gather_negatives=options.gather_negatives,
            ),
        )

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        patches = self._view.random(images, streams.views, share=streams.share)
        output: GridInfoNCEOutput = self.model(patches)
        return {"loss": output.loss, "accuracy": output.accuracy, "mutual_information": output.mutual_information}

    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return model.encode(center_or_random(self._view, images, generator))

    @property
    def guess(self) -> dict[str, float]:
        return guessing(self._config.view.grid_size**2 * self.contrasted_images)

    def _save_figures(self, run: RunDir) -> None:
        self._save_curves(run, loss="InfoNCE loss")
        encodings = partial(self.encodings, self.model)
        save_patch_figures(run, self._view, self._shown, encodings, self._config.compute.seed)


TASK = CPCv2Task
