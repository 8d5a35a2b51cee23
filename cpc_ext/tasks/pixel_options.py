"""Options that all pixel models share, and those of a PixelCNN, gated or not."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cpc_ext.training.config import MAY_CHANGE, MOST, Preset, Presets, RunConfig, Section

__all__ = ["PIXEL_PRESETS", "PixelConfig", "PixelSection", "SoftmaxPixelConfig", "SoftmaxPixelSection"]


class PixelSection(Section):
    """The network, which predicts every value of an image from those before it, and its evaluation in training."""

    layers: int = Field(
        12,
        ge=1,
        le=1000,
        description="Number of residual blocks of a PixelCNN, or of layers of a gated one; each one sees one pixel "
        "further.",
    )
    hidden_channels: int = Field(
        96,
        ge=1,
        le=MOST,
        description="Channels, a multiple of the number of colours: h of a PixelCNN, which has 2h channels between its "
        "blocks, or p of each stack of a gated PixelCNN.",
    )
    class_conditional: bool = Field(
        False,
        description="Condition the network on the class of an image. Needs --model gated-pixelcnn or pixelcnn++, and "
        "images with labels.",
    )
    mirror: bool = Field(False, description="Mirror half of the training images left to right.")
    sample_every: Annotated[int, MAY_CHANGE] = Field(
        500,
        ge=1,
        description="Number of updates between evaluations during training: bits per dimension of held-out images, "
        "and samples as PNG.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, which is evaluated, sampled from and saved "
        "in their place; the first updates use a lower decay. Published for PixelCNN++: 0.9995. 0: no average.",
    )


class PixelConfig(RunConfig):
    """A run of a pixel model: a PixelCNN, gated or not, or PixelCNN++."""

    pixelcnn: PixelSection = Field(default_factory=PixelSection)

    @model_validator(mode="after")
    def _model_takes_classes(self) -> PixelConfig:
        if self.pixelcnn.class_conditional and self.model == "pixelcnn":
            raise ValueError("--class-conditional needs --model gated-pixelcnn or pixelcnn++, got pixelcnn")
        return self

    def idle(self) -> dict[str, str]:
        return super().idle() | {"channels_last": f"--model {self.model} lays its features out by itself"}


class SoftmaxPixelSection(PixelSection):
    """The network, which predicts every value of an image, or every code, by a softmax."""

    levels: int | None = Field(
        None,
        ge=2,
        le=2**16,
        description="Train on codes from 0 to this number - 1, such as those of a VQ-VAE, of which the model is then a "
        "prior: arrays of integers (--dataset codes). None: train on images.",
    )
    code_channels: int = Field(
        32,
        ge=0,
        le=MOST,
        description="Size of the learned embedding of each code, with --levels. 0: codes are ordered numbers, such as "
        "brightness in few bits, and need no embedding.",
    )


class SoftmaxPixelConfig(PixelConfig):
    """A run of a PixelCNN, gated or not, on images or on codes."""

    pixelcnn: SoftmaxPixelSection = Field(default_factory=SoftmaxPixelSection)

    def idle(self) -> dict[str, str]:
        codes = {} if self.pixelcnn.levels is not None else {"code_channels": "only codes have them (--levels)"}
        return super().idle() | codes


# Batches are small, as the number of updates matters more than their size.
_CIFAR: Preset = {
    "pixelcnn": {"layers": 15, "hidden_channels": 96, "sample_every": 2000},
    "optimization": {
        "epochs": 50,
        "batch_size": 16,
        "lr": 4e-4,
        "schedule": "cosine",
        "warmup_steps": 500,
        "clip_grad": 1.0,
    },
}
# Whole 96x96 images have nine times the pixels of 32x32 ones, so the batch is smaller.
_STL10: Preset = {
    "pixelcnn": {"layers": 15, "hidden_channels": 96, "sample_every": 5000},
    "optimization": {**_CIFAR["optimization"], "epochs": 5, "batch_size": 4},
}
# Minutes on two CPU cores.
_TEXTURES: Preset = {
    "data": {"image_size": 32},
    "pixelcnn": {"layers": 5, "hidden_channels": 24, "sample_every": 250},
    "optimization": {
        "steps": 1000,
        "batch_size": 16,
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip_grad": 1.0,
    },
}

PIXEL_PRESETS: Presets = {
    "textures": _TEXTURES,
    "stl10": _STL10,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": {**_CIFAR, "data": {"image_size": 32}},
}
