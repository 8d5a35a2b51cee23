"""The options of a gated PixelCNN: those of the other."""

from cpc_ext.tasks.pixelcnn.options import CONFIG, PRESETS

__all__ = ["CONFIG", "PRESETS"]
