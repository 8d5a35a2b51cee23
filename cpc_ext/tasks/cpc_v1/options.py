"""The options of CPC, version 1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpc_ext.tasks.patch_options import PredictionConfig, PredictionSection
from cpc_ext.training.config import Preset, Presets

__all__ = ["CONFIG", "PRESETS", "CPCConfig", "CPCSection"]


class CPCSection(PredictionSection):
    """The networks and the prediction task of contrastive predictive coding."""

    neg_samples: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        16, description="Number of negatives sampled for each prediction, or all: every other target in the batch."
    )

    @model_validator(mode="after")
    def _ring_holds_all(self) -> CPCSection:
        if self.gather_negatives == "ring" and self.neg_samples != "all":
            raise ValueError("--gather-negatives ring needs --neg-samples all: samples may be keys of any process")
        return self


class CPCConfig(PredictionConfig):
    """A run of contrastive predictive coding."""

    cpc: CPCSection = Field(default_factory=CPCSection)

    def keys_by_step(self, images: int) -> list[int]:
        """Return the number of keys, including the target, of each step ahead. images: number contrasted together."""
        options, grid_size = self.cpc, self.view.grid_size
        if options.neg_samples != "all":
            return [options.neg_samples + 1]
        row = grid_size * images
        return [row * (grid_size - options.skip - step) for step in range(1, options.pred_steps + 1)]


CONFIG = CPCConfig

# For 32-pixel photographs on a CPU, in patches of 20 pixels: docs/results.md. Colours are kept, as they tell classes
# apart; they do not give away a patch's neighbours, as each patch is augmented on its own.
SMALL_VIEW = {"crop": 32, "grid_size": 3, "patch_size": 20, "gray": False, "patch_augmentation": True}
SMALL_PREDICTION = {
    "encoder": "resnet-small",
    "context_layers": 1,
    "pred_steps": 1,
    "pred_directions": 4,
}
SMALL_OPTIMIZATION = {
    "epochs": 100,
    "batch_size": 64,
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 50,
    "clip_grad": 10.0,
}

# For the same photographs on a GPU, which a smaller batch would leave idle. Wide encoders need a lower learning rate
# than narrow ones (docs/results.md#minutes-of-a-gpu).
_CIFAR: Preset = {
    "view": SMALL_VIEW,
    "cpc": {**SMALL_PREDICTION, "encoder": "resnet14", "norm": "batch", "neg_samples": "all"},
    "optimization": {**SMALL_OPTIMIZATION, "batch_size": 256, "lr": 6e-4, "warmup_steps": 500},
}

PRESETS: Presets = {
    # Minutes on two CPU cores. Grey patches, each normalised to zero mean and unit contrast, share nothing with their
    # neighbours but the structure that runs through both.
    "textures": {
        "view": {"crop": 56, "grid_size": 6, "patch_norm": True},
        "cpc": {
            "encoder": "resnet-small",
            "norm": "layer",
            "context_layers": 1,
            "pred_steps": 3,
            "pred_directions": 2,
            "neg_samples": "all",
        },
        "optimization": {
            "steps": 1200,
            "batch_size": 16,
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "clip_grad": 10.0,
        },
    },
    # The example settings of CPCV2-PyTorch, which keeps colours unless it is told not to.
    "stl10": {
        "view": {"crop": 64, "grid_size": 7, "gray": False},
        "cpc": {"encoder": "resnet14", "pred_steps": 5, "neg_samples": 16},
        "optimization": {"epochs": 300, "batch_size": 16},
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder-small": {
        "data": {"image_size": 32},
        "view": SMALL_VIEW,
        "cpc": {**SMALL_PREDICTION, "norm": "batch", "neg_samples": "all"},
        "optimization": SMALL_OPTIMIZATION,
    },
    "folder": {
        "view": {"crop": 64, "grid_size": 7, "patch_norm": True},
        "cpc": {"encoder": "resnet14", "norm": "layer", "pred_steps": 5, "neg_samples": "all"},
        "optimization": {"epochs": 100, "batch_size": 32, "schedule": "cosine", "warmup_steps": 500, "clip_grad": 10.0},
    },
}
