"""The task of training MoCo: one view of an image found among keys of earlier batches, linear probe."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.models import MoCo
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.tasks.encoder_task import guessing
from cpc_ext.tasks.moco.options import MoCoConfig
from cpc_ext.tasks.two_view_task import TwoViewTask
from cpc_ext.training.random_streams import RandomStreams

__all__ = ["TASK", "MoCoTask"]


class MoCoTask(TwoViewTask):
    """Momentum contrast (He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297) on a data set."""

    model: MoCo
    loss_name = "InfoNCE loss"
    _config: MoCoConfig

    def _build(self) -> MoCo:
        options = self._config.moco
        return MoCo(
            self._encoder_spec.build(options.view_size),
            projection_channels=options.projection_channels,
            temperature=options.temperature,
            queue_size=options.queue_size,
            momentum=options.key_momentum,
            gather_negatives=options.gather_negatives,
            head=options.head,
        )

    def initial_model(self) -> EncoderModel:
        model = super().initial_model()
        assert isinstance(model, MoCo)
        if self._config.compute.channels_last:
            # As for the encoder; PyTorch's annotations allow memory_format only beside a device.
            model.key_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        output = self.model(self.views(images, streams))
        return output._asdict()

    def updated(self) -> None:
        self.model.follow()

    def carried(self) -> dict[str, Tensor]:
        """Return this process's queue if each has its own; the model in a checkpoint has that of the first process."""
        if self._config.moco.gather_negatives != "none":
            return {}
        queue = self.model.objective.queue
        return {"queue.keys": queue.keys, "queue.position": queue.position[None]}

    def carry_on(self, carried: dict[str, Tensor]) -> None:
        if carried:
            queue = self.model.objective.queue
            queue.keys.copy_(carried["queue.keys"])
            queue.position.copy_(carried["queue.position"][0])

    @property
    def guess(self) -> dict[str, float]:
        return guessing(self._config.moco.queue_size + 1)


TASK = MoCoTask
