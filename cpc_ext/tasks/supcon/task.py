"""The task of training by supervised contrast: two views of images with labels, linear probe."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data import Dataset
from cpc_ext.models import SupCon
from cpc_ext.tasks.encoder_task import guessing
from cpc_ext.tasks.supcon.options import SupConConfig
from cpc_ext.tasks.two_view_task import TwoViewTask
from cpc_ext.training.random_streams import RandomStreams

__all__ = ["TASK", "SupConTask"]


class SupConTask(TwoViewTask):
    """Supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362) on a data set.

    Raises:
        ValueError: images without labels; a blur that does not fit the views.
    """

    model: SupCon
    loss_name = "SupCon loss"

    def __init__(self, config: SupConConfig, dataset: Dataset, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        if self.examples.labels is None and dataset.train is not None:
            self.examples = dataset.train
        if self.examples.labels is None:
            raise ValueError(f"--model supcon: the images of {dataset.name} have no labels")

    def _build(self) -> SupCon:
        options = self._config.encoder_section
        return SupCon(
            self._encoder_spec.build(options.view_size),
            projection_channels=options.projection_channels,
            temperature=options.temperature,
            gather_negatives=options.gather_negatives,
            head=options.head,
        )

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        assert labels is not None
        output = self.model(self.views(images, streams), labels)
        return output._asdict()

    @property
    def guess(self) -> dict[str, float]:
        assert self.examples.labels is not None
        shares = np.bincount(self.examples.labels) / len(self.examples)
        # By chance, the nearest view is of the same class as often as any two images are.
        return {**guessing(2 * self.contrasted_images - 1), "accuracy": float((shares**2).sum())}


TASK = SupConTask
