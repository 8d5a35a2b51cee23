"""The task of training a gated PixelCNN."""

from __future__ import annotations

from typing import Any

from cpc_ext.tasks.softmax_pixel_task import SoftmaxPixelTask

__all__ = ["TASK", "GatedPixelCNNTask"]


class GatedPixelCNNTask(SoftmaxPixelTask):
    """A gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328) on a data set."""

    def _model(self) -> tuple[str, dict[str, Any]]:
        options = self._config.pixelcnn
        return "GatedPixelCNN", {
            "channels": options.hidden_channels,
            "num_classes": self._num_classes,
            "layers": options.layers,
            **self._codes(),
        }


TASK = GatedPixelCNNTask
