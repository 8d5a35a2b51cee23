"""The task of training SimCLR: two random views of whole images, NT-Xent, linear probe."""

from __future__ import annotations

from torch import Tensor

from cpc_ext.models import SimCLR
from cpc_ext.nn import NTXentOutput
from cpc_ext.tasks.encoder_task import guessing
from cpc_ext.tasks.two_view_task import TwoViewTask
from cpc_ext.training.random_streams import RandomStreams

__all__ = ["TASK", "SimCLRTask"]


class SimCLRTask(TwoViewTask):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709) on a data set."""

    model: SimCLR
    loss_name = "NT-Xent loss"

    def _build(self) -> SimCLR:
        options = self._config.encoder_section
        return SimCLR(
            self._encoder_spec.build(options.view_size),
            projection_channels=options.projection_channels,
            temperature=options.temperature,
            gather_negatives=options.gather_negatives,
            head=options.head,
        )

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        output: NTXentOutput = self.model(self.views(images, streams))
        return output._asdict()

    @property
    def guess(self) -> dict[str, float]:
        return guessing(2 * self.contrasted_images - 1)


TASK = SimCLRTask
