"""The task of training CPC v2: patches each augmented on its own, four directions, targets out of all of the batch.

Crops, figures and the probe are those of CPC v1; what differs is the model that stands around the encoder.
"""

from __future__ import annotations

import math

from torch import Tensor

from cpc_ext.models import CPC, PatchEncoder, ResidualContext
from cpc_ext.nn import TargetInfoNCE
from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.tasks.cpc_v2.options import CPCv2Config
from cpc_ext.training.random_streams import RandomStreams

__all__ = ["TASK", "CPCv2Task"]


class CPCv2Task(CPCv1Task):
    """CPC v2 (Hénaff et al. 2019, arXiv 1905.09272) on a data set.

    The loss is the mean over steps where the paper has their sum, which leaves Adam's updates nearly the same.
    """

    _config: CPCv2Config

    def _contrast(self, patches: Tensor, streams: RandomStreams) -> GridInfoNCEOutput:
        output: GridInfoNCEOutput = self.model(patches)
        return output

    def _guessing(self) -> dict[str, float]:
        keys = self._config.view.grid_size**2 * self._config.optimization.batch_size
        return {"loss": math.log(keys), "accuracy": 1 / keys}

    def _cpc(self, encoder: PatchEncoder) -> CPC:
        options = self._config.cpc
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


TASK = CPCv2Task
