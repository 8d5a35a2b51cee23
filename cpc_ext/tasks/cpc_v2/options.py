"""The options of CPC, version 2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cpc_ext.tasks.cpc_v1.options import SMALL_OPTIMIZATION, SMALL_PREDICTION, SMALL_VIEW
from cpc_ext.tasks.encoder_options import NORM_HELP, Norm
from cpc_ext.tasks.patch_options import PredictionConfig, PredictionSection
from cpc_ext.training.config import MOST, Preset, Presets

__all__ = ["CONFIG", "PRESETS", "RECIPES", "CPCv2Config", "CPCv2Section"]


class CPCv2Section(PredictionSection):
    """The networks and the prediction task of contrastive predictive coding, version 2."""

    recipe: Literal["short", "published"] = Field(
        "short",
        description="Settings that are the defaults of the other options, if the data set's preset is for runs of "
        "minutes. short: the settings that learn most in minutes; published: the paper's norm, colours and scale of "
        "the predictions.",
    )
    norm: Norm = Field("layer", description=f"{NORM_HELP} The published CPC v2 uses layer norm.")
    context_layers: int = Field(
        5,
        ge=1,
        le=1000,
        description="Number of residual blocks of a context network; each one sees one row further up.",
    )
    context_channels: int = Field(256, ge=1, le=MOST, description="Inner channels of a context network's blocks.")
    shared_context: bool = Field(
        False,
        description="Use one context network for all directions, as in CPCV2-PyTorch, rather than one for each.",
    )
    pred_directions: int = Field(
        4,
        ge=1,
        le=4,
        description="Number of directions to predict in: 1 is down; each further one turns the grid by 90 degrees.",
    )
    target_channels: int = Field(
        64,
        ge=1,
        le=MOST,
        description="Channels of the projected encodings that are predicted and contrasted with all of the batch.",
    )
    prediction_scale: float = Field(
        0.1, gt=0, le=100, description="Factor that scales the predictions, and thus the initial logits."
    )
    variant: Literal["paper", "lightning-bolts"] = Field(
        "paper",
        description="paper: as published; lightning-bolts: as Lightning Bolts' CPC_v2, which pads context networks in "
        "its own way, predicts all steps with one convolution and weights the loss of step k by k. lightning-bolts "
        "needs one direction and all steps that fit the grid.",
    )


class CPCv2Config(PredictionConfig):
    """A run of contrastive predictive coding, version 2."""

    cpc: CPCv2Section = Field(default_factory=CPCv2Section)

    @model_validator(mode="after")
    def _variant_predicts_all(self) -> CPCv2Config:
        options, steps = self.cpc, self.view.grid_size - 1 - self.cpc.skip
        if options.variant == "lightning-bolts" and (options.pred_directions, options.pred_steps) != (1, steps):
            raise ValueError(
                f"--variant lightning-bolts predicts in one direction, and all {steps} steps that --grid-size "
                f"{self.view.grid_size} has: it needs --pred-directions 1 --pred-steps {steps}"
            )
        return self

    def remedies(self) -> list[str]:
        louder = ["--prediction-scale 1"] if self.cpc.prediction_scale < 1 else []
        return [*louder, *super().remedies()]


CONFIG = CPCv2Config

# Presets for runs of hours take the paper's settings under either recipe: the short recipe's changes were measured only
# in runs of minutes.
_VIEW = {"gray": False, "patch_norm": False, "patch_augmentation": True}
_PAPER = {"norm": "layer", "prediction_scale": 0.1}

# Departures from the paper that each gain accuracy in a short run (docs/results.md): larger logits, from which learning
# starts sooner, batch norm, and grey patches, each normalised to zero mean and unit contrast.
RECIPES: dict[str, Preset] = {
    "short": {
        "view": {"gray": True, "patch_norm": True},
        "cpc": {"recipe": "short", "norm": "batch", "prediction_scale": 1.0},
    },
    "published": {"view": {"gray": False, "patch_norm": False}, "cpc": {"recipe": "published", **_PAPER}},
}

# CPCV2-PyTorch's example: half-overlapping patches of 10 pixels in colour.
_CIFAR: Preset = {
    "view": {"crop": 30, "pad": 2, "grid_size": 5, **_VIEW},
    "cpc": {**_PAPER, "encoder": "wrn-28-2", "pred_steps": 3},
    "optimization": {"epochs": 500, "batch_size": 64, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
}

PRESETS: Presets = {
    # Minutes on two CPU cores.
    "textures": {
        "view": {"crop": 56, "grid_size": 6, "patch_augmentation": True},
        "cpc": {
            "encoder": "resnet-small",
            "context_layers": 1,
            "context_channels": 64,
            "pred_steps": 3,
        },
        "optimization": {
            "steps": 1000,
            "batch_size": 16,
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "clip_grad": 10.0,
        },
    },
    "stl10": {
        "view": {"crop": 64, "grid_size": 7, **_VIEW},
        "cpc": {**_PAPER, "encoder": "resnet28", "pred_steps": 5},
        "optimization": {"epochs": 300, "batch_size": 32, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder-small": {
        "data": {"image_size": 32},
        "view": {**SMALL_VIEW, "patch_norm": False},
        "cpc": {**SMALL_PREDICTION, "context_channels": 64},
        "optimization": SMALL_OPTIMIZATION,
    },
    # As published for ImageNet.
    "folder": {
        "data": {"image_size": 300},
        "view": {"crop": 260, "grid_size": 6, "patch_size": 80, **_VIEW},
        "cpc": {**_PAPER, "encoder": "resnet161", "pred_steps": 3},
        "optimization": {"epochs": 200, "batch_size": 16, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
    },
}
