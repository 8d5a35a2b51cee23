"""The options of a PixelCNN."""

from cpc_ext.tasks.pixel_options import PIXEL_PRESETS, SoftmaxPixelConfig

__all__ = ["CONFIG", "PRESETS"]

CONFIG = SoftmaxPixelConfig
PRESETS = PIXEL_PRESETS
