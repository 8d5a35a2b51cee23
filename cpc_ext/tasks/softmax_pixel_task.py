"""The common part of the tasks of PixelCNNs, gated or not, which predict images or codes by a softmax."""

from __future__ import annotations

from cpc_ext.tasks.pixel_options import SoftmaxPixelConfig
from cpc_ext.tasks.pixel_task import PixelTask

__all__ = ["SoftmaxPixelTask"]


class SoftmaxPixelTask(PixelTask):
    """A model of pixels or, with ``--levels``, of codes. Raises ValueError also for codes beyond the levels."""

    _config: SoftmaxPixelConfig

    def _check_values(self) -> None:
        levels = self._config.pixelcnn.levels
        if levels is None:
            return super()._check_values()
        largest = max(int(images.images.max(initial=0)) for images in (self.examples, self._test))
        if largest >= levels:
            raise ValueError(f"--levels {levels}: {self._dataset.name} holds values up to {largest}")

    def _codes(self) -> dict[str, int]:
        """Return the model's arguments for codes; none for images."""
        options = self._config.pixelcnn
        return {} if options.levels is None else {"levels": options.levels, "code_channels": options.code_channels}
