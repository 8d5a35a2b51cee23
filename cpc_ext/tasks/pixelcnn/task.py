"""The task of training a PixelCNN."""

from __future__ import annotations

from typing import Any

from cpc_ext.tasks.softmax_pixel_task import SoftmaxPixelTask

__all__ = ["TASK", "PixelCNNTask"]


class PixelCNNTask(SoftmaxPixelTask):
    """A PixelCNN (van den Oord et al. 2016, arXiv 1601.06759) on a data set."""

    def _model(self) -> tuple[str, dict[str, Any]]:
        options = self._config.pixelcnn
        return "PixelCNN", {
            "layers": options.layers,
            "hidden_channels": options.hidden_channels,
            **self._codes(),
        }


TASK = PixelCNNTask
