"""Options of the models that contrast two random views of whole images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from cpc_ext.tasks.encoder_names import takes_one_size
from cpc_ext.tasks.encoder_options import ContrastSection, EncoderConfig, EncoderSection
from cpc_ext.training.config import MOST, Preset, Presets

__all__ = ["TwoViewConfig", "TwoViewSection", "two_view_presets"]


class TwoViewSection(ContrastSection, EncoderSection):  # Fields of the last base class come first.
    """The encoder, the views of an image and the projection head."""

    view_size: int = Field(96, ge=8, le=MOST, description="Side in pixels of the two views of an image.")
    center_scale: float = Field(
        1.0,
        ge=0.5,
        le=4,
        description="Side of the whole images that the encoder is evaluated and used on, as a multiple of --view-size. "
        "As views magnify their content, values above 1 may give better accuracy.",
    )
    min_crop_area: float = Field(
        0.08, gt=0, le=1, description="Smallest fraction of an image's area that a view shows; the largest is 1."
    )
    flip: bool = Field(True, description="Mirror half of the views left to right.")
    jitter_strength: Annotated[float, Field(ge=0, le=1.25)] | None = Field(
        None,
        description="Strength s of the colour jitter, as defined in the SimCLR paper: brightness, contrast and "
        "saturation change by factors within 1 ± 0.8 s, hue by up to 0.2 s of the colour circle. None: "
        "factors within 1 ± 0.5, and hue by up to 0.1.",
    )
    jitter_probability: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter of a view.")
    gray_probability: float = Field(0.2, ge=0, le=1, description="Probability of converting a view to grey.")
    blur_kernel: int = Field(
        9,
        ge=0,
        le=MOST,
        description="Kernel size of the Gaussian blur of a view: an odd number, about a tenth of the view's side. 0: "
        "no blur.",
    )
    blur_probability: float = Field(1.0, gt=0, le=1, description="Probability of blurring a view.")
    projection_channels: int = Field(
        128, ge=1, le=MOST, description="Output channels of the projection head, which the loss compares."
    )
    head_layers: int = Field(
        2, ge=1, le=10, description="Number of linear layers of the projection head, with ReLU in between."
    )
    head_channels: Annotated[int, Field(ge=1, le=MOST)] | None = Field(
        None, description="Channels of the head's hidden layers. None: four times --projection-channels."
    )
    head_norm: bool = Field(False, description="Use batch norm after every layer of the head, in place of biases.")
    temperature: float = Field(0.07, gt=0, le=100, description="Temperature, which divides the cosine similarities.")

    @model_validator(mode="after")
    def _blur_fits(self) -> TwoViewSection:
        if self.blur_kernel and (self.blur_kernel % 2 == 0 or self.blur_kernel >= 2 * self.view_size):
            below = f"2 * --view-size {self.view_size}"
            raise ValueError(f"--blur-kernel {self.blur_kernel} is neither 0 nor an odd number below {below}")
        return self

    @property
    def head(self) -> dict[str, Any]:
        """The arguments of the projection head."""
        return {"layers": self.head_layers, "hidden": self.head_channels, "norm": self.head_norm}

    @property
    def view(self) -> dict[str, Any]:
        """The fields of the view that depend on options."""
        strength = self.jitter_strength
        jitter = (
            {} if strength is None else {"jitter": (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)}
        )
        return jitter | {
            "center_scale": 1.0 if takes_one_size(self.encoder) else self.center_scale,
            "min_area": self.min_crop_area,
            "flip": self.flip,
            "jitter_probability": self.jitter_probability,
            "gray_probability": self.gray_probability,
            "blur_kernel": self.blur_kernel,
            "blur_probability": self.blur_probability,
        }


class TwoViewConfig(EncoderConfig):
    """A run of a model of two views.

    Attributes:
        least_images: smallest batch size at which every view has negatives.
    """

    least_images: ClassVar[int] = 2

    @property
    def encoder_section(self) -> TwoViewSection:
        raise NotImplementedError

    @model_validator(mode="after")
    def _views_have_others(self) -> TwoViewConfig:
        if self.optimization.batch_size < self.least_images:
            raise ValueError(
                f"--batch-size {self.optimization.batch_size} leaves the views of an image none to be told from: "
                f"{self.model} needs {self.least_images} or more"
            )
        return self

    def idle(self) -> dict[str, str]:
        options, idle = self.encoder_section, super().idle()
        if options.center_scale != 1 and takes_one_size(options.encoder):
            idle["center_scale"] = f"--encoder {options.encoder} takes images of one size"
        if options.blur_kernel == 0:
            idle["blur_probability"] = "--blur-kernel 0 blurs nothing"
        if options.jitter_probability == 0:
            idle["jitter_strength"] = "--jitter-probability 0 jitters nothing"
        if options.head_layers == 1:
            idle["head_channels"] = "--head-layers 1 has none inside"
        return idle


# The settings of STL-10 in the University of Amsterdam's tutorial 17: AdamW and a cosine to a fiftieth.
_OPTIMIZATION = {
    "epochs": 500,
    "batch_size": 256,
    "lr": 5e-4,
    "schedule": "cosine",
    "final_lr": 0.02,
    "weight_decay": 1e-4,
}


# For 32-pixel photographs on a CPU. They are too small to be blurred.
SMALL_VIEWS = {
    "encoder": "resnet-small",
    "norm": "batch",
    "view_size": 32,
    "blur_kernel": 0,
    "temperature": 0.2,
    "head_norm": True,
}
SMALL_OPTIMIZATION = {
    "epochs": 100,
    "batch_size": 128,
    "lr": 2e-3,
    "schedule": "cosine",
    "final_lr": 0.02,
    "warmup_steps": 50,
    "weight_decay": 1e-4,
}


def two_view_presets(section: str, optimization: Mapping[str, Any] | None = None, **options: Any) -> Presets:
    """Return the presets of a model whose section of options has this name.

    optimization: changes of the optimization; they leave out textures and folders of small images, whose runs take
    minutes. options: options of the section, for all data sets.
    """
    rest = _OPTIMIZATION if optimization is None else {**_OPTIMIZATION, **optimization}
    large: Preset = {
        section: {"encoder": "resnet18", "norm": "batch", "view_size": 96, **options},
        "optimization": rest,
    }
    # For the same photographs as in "folder-small", for hours on a GPU; docs/h200.md has the first minutes.
    small: Preset = {
        section: {**SMALL_VIEWS, "encoder": "resnet18", **options},
        "optimization": {**rest, "lr": 1.5e-3, "warmup_steps": 50, **(optimization or {})},
    }
    return {
        # Takes about as long as CPC on the same images.
        "textures": {
            section: {
                "encoder": "resnet-small",
                "norm": "batch",
                "view_size": 48,
                "min_crop_area": 0.2,
                "blur_kernel": 5,
                "temperature": 0.2,
                **options,
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
        "stl10": large,
        "cifar10": small,
        "cifar100": small,
        "folder": {**large, "data": {"image_size": 96}},
        # Learns the most in ten minutes on a core: docs/results.md.
        "folder-small": {
            "data": {"image_size": 32},
            section: {**SMALL_VIEWS, **options},
            "optimization": SMALL_OPTIMIZATION,
        },
    }
