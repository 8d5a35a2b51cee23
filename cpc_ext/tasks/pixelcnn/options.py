"""The options of a PixelCNN."""

from cpc_ext.tasks.pixel_options import PIXEL_PRESETS, PixelConfig

__all__ = ["CONFIG", "PRESETS"]

CONFIG = PixelConfig
PRESETS = PIXEL_PRESETS
