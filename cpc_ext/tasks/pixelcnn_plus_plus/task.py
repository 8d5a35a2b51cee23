"""The task of training PixelCNN++, optionally with data-dependent initialization."""

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
        """Accept any number of channels, as one mixture predicts all colours of a pixel."""

    def _initialize(self) -> None:
        """Initialize the model from a batch of training images, equally in all processes, if ``data_init`` is set."""
        if not self._config.pixelcnn.data_init:
            return
        seed = self._config.compute.seed
        batch_size = min(self._config.optimization.batch_size, len(self.examples))
        indices = np.random.default_rng(seed).choice(len(self.examples), batch_size, replace=False)
        fetch = ImageFetcher(self.examples, self._device, resident=False)
        labels = fetch.labels(indices) if self._config.pixelcnn.class_conditional else None
        self.model.initialize(fetch(indices), labels)


TASK = PixelCNNPPTask
