"""The options of PixelCNN++."""

from __future__ import annotations

from pydantic import Field

from cpc_ext.tasks.pixel_options import PIXEL_PRESETS, PixelConfig, PixelSection
from cpc_ext.training.config import MOST, Preset, Presets

__all__ = ["CONFIG", "PRESETS", "PixelCNNPPConfig", "PixelCNNPPSection"]


class PixelCNNPPSection(PixelSection):
    """The network, which predicts every pixel of an image from those before it, and its evaluation in training."""

    layers: int = Field(
        2, ge=1, le=1000, description="Number of gated blocks of a stream at each of three resolutions. Published: 5."
    )
    hidden_channels: int = Field(96, ge=1, le=MOST, description="Channels of each of the two streams. Published: 160.")
    mixtures: int = Field(
        10, ge=1, le=1000, description="Number of components of the mixture of logistics for each pixel."
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout rate of the channels in each gated block.")
    data_init: bool = Field(
        True,
        description="Use data-dependent initial weights: on a batch of the images, the outputs of all layers have mean "
        "0 and standard deviation 1.",
    )


class PixelCNNPPConfig(PixelConfig):
    """A run of PixelCNN++."""

    pixelcnn: PixelCNNPPSection = Field(default_factory=PixelCNNPPSection)

    def idle(self) -> dict[str, str]:
        started = self.optimization.resume_from is not None
        return super().idle() | ({"data_init": "--resume-from brings the weights"} if started else {})


CONFIG = PixelCNNPPConfig

# Three fifths of the published channels and blocks: a quarter of the parameters, 12 million.
_CIFAR: Preset = {
    "pixelcnn": {"layers": 3, "hidden_channels": 96, "sample_every": 2000, "ema_decay": 0.9995},
    "optimization": {**PIXEL_PRESETS["cifar10"]["optimization"], "lr": 1e-3},
}
_STL10: Preset = {
    "pixelcnn": {**_CIFAR["pixelcnn"], "sample_every": 5000},
    "optimization": {**PIXEL_PRESETS["stl10"]["optimization"], "lr": 1e-3},
}
# Minutes on two CPU cores. Generated textures are not limited in number and need no dropout.
_TEXTURES: Preset = {
    "data": {"image_size": 32},
    "pixelcnn": {"layers": 1, "hidden_channels": 24, "dropout": 0.0, "sample_every": 250, "ema_decay": 0.99},
    "optimization": PIXEL_PRESETS["textures"]["optimization"],
}

PRESETS: Presets = {
    "textures": _TEXTURES,
    "stl10": _STL10,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": {**_CIFAR, "data": {"image_size": 32}},
}
