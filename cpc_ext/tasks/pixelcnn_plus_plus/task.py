"""The task of training PixelCNN++, which may start from what its layers make of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpc_ext.data import ImageFetcher
from cpc_ext.models import PixelCNNPP
from cpc_ext.tasks.pixel_task import PixelTask
from cpc_ext.tasks.pixelcnn_plus_plus.options import PixelCNNPPConfig

__all__ = ["TASK", "PixelCNNPPTask"]


class PixelCNNPPTask(PixelTask):
    """PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517) on a data set."""

    _config: PixelCNNPPConfig
    model: PixelCNNPP

    def _model(self) -> tuple[str, dict[str, Any]]:
        options = self._config.pixelcnn
        return "PixelCNNPP", {
            "channels": options.hidden_channels,
            "num_classes": self._num_classes,
            "blocks": options.layers,
            "mixtures": options.mixtures,
            "dropout": options.dropout,
        }

    def _check_options(self) -> None:
        """All are right: a pixel's colours come of one mixture."""

    def _initialize(self) -> None:
        """Let the model start from what its layers make of a batch of training images, the same in all processes."""
        if not self._config.pixelcnn.data_init:
            return
        seed = self._config.compute.seed
        batch_size = min(self._config.optimization.batch_size, len(self.examples))
        indices = np.random.default_rng(seed).choice(len(self.examples), batch_size, replace=False)
        fetch = ImageFetcher(self.examples, self._device, resident=False)
        labels = fetch.labels(indices) if self._config.pixelcnn.class_conditional else None
        self.model.initialize(fetch(indices), labels)


TASK = PixelCNNPPTask
