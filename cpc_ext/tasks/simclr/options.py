"""The options of SimCLR."""

from __future__ import annotations

from pydantic import Field

from cpc_ext.tasks.encoder_options import ContrastSection, EncoderConfig, EncoderSection
from cpc_ext.training.config import MOST, Preset, Presets

__all__ = ["CONFIG", "PRESETS", "SimCLRConfig", "SimCLRSection"]


class SimCLRSection(ContrastSection, EncoderSection):  # Fields of the last come first.
    """The networks, the views and the loss of SimCLR."""

    view_size: int = Field(96, ge=8, le=MOST, description="Side in pixels of the two views of an image.")
    min_crop_area: float = Field(
        0.08, gt=0, le=1, description="Smallest share of an image's area that a view shows; the largest is all of it."
    )
    blur_kernel: int = Field(
        9,
        ge=0,
        le=MOST,
        description="Taps of the Gaussian blur of a view, an odd number, about a tenth of its side. 0: none.",
    )
    projection_channels: int = Field(
        128, ge=1, le=MOST, description="Features that the loss compares, behind a hidden layer of four times as many."
    )
    temperature: float = Field(0.07, gt=0, le=100, description="Divisor of the cosine similarities.")


class SimCLRConfig(EncoderConfig):
    """A run of SimCLR."""

    simclr: SimCLRSection = Field(default_factory=SimCLRSection)

    @property
    def encoder_section(self) -> EncoderSection:
        return self.simclr


CONFIG = SimCLRConfig

# The tutorial's settings of STL-10: AdamW and a cosine to a fiftieth. Small images bear no blur.
_OPTIMIZATION = {
    "epochs": 500,
    "batch_size": 256,
    "lr": 5e-4,
    "schedule": "cosine",
    "final_lr": 0.02,
    "weight_decay": 1e-4,
}
_STL10: Preset = {
    "simclr": {"encoder": "resnet18", "norm": "batch", "view_size": 96},
    "optimization": _OPTIMIZATION,
}
_CIFAR: Preset = {
    "simclr": {"encoder": "resnet18", "norm": "batch", "view_size": 32, "blur_kernel": 0},
    "optimization": _OPTIMIZATION,
}

PRESETS: Presets = {
    # About the computing time of CPC on the same images.
    "textures": {
        "simclr": {
            "encoder": "resnet-small",
            "norm": "batch",
            "view_size": 48,
            "min_crop_area": 0.2,
            "blur_kernel": 5,
            "temperature": 0.2,
        },
        "optimization": {
            "steps": 850,
            "batch_size": 64,
            "lr": 2e-3,
            "schedule": "cosine",
            "final_lr": 0.02,
            "warmup_steps": 20,
            "weight_decay": 1e-4,
        },
    },
    "stl10": _STL10,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": {**_STL10, "data": {"image_size": 96}},
}
