"""The options of CPC on speech, and its two recipes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cpc_ext.tasks.speech_options import SequencePredictionSection, SpeechConfig
from cpc_ext.training.config import Preset, Presets

__all__ = ["CONFIG", "PRESETS", "RECIPES", "CPCAudioConfig", "CPCAudioSection"]


class CPCAudioSection(SequencePredictionSection):
    """The recipe, and the prediction task of contrastive predictive coding."""

    recipe: Literal["original", "modified"] = Field(
        "original",
        description="Settings that are the defaults of the other options. original: those of the paper, as implemented "
        "in Greedy InfoMax's program; modified: those of Rivière et al. 2020, CPC_audio.",
    )


class CPCAudioConfig(SpeechConfig):
    """A run of contrastive predictive coding on speech."""

    prediction: CPCAudioSection = Field(default_factory=CPCAudioSection)


CONFIG = CPCAudioConfig

RECIPES: dict[str, Preset] = {
    "original": {"prediction": {"recipe": "original"}},
    "modified": {
        "view": {"windows": "same-speaker"},
        "encoder": {"channels": 256, "padding": "cpc-audio", "norm": "channel", "normalization": "none"},
        "context": {"context": "lstm"},
        "prediction": {
            "recipe": "modified",
            "predictor": "transformer",
            "sampling": "shifted",
            "neg_samples": 128,
            "common_positions": True,
            "reduction": "sum",
            "score": "mean",
        },
    },
}

# For less than two hours of the user's own recordings, on two CPU cores: docs/speech.md.
FEW: Preset = {
    "encoder": {"channels": 128, "norm": "batch"},
    "context": {"context_channels": 128},
    "optimization": {"epochs": 60, "batch_size": 8, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
}

PRESETS: Presets = {
    # Minutes on two CPU cores. The paper's encoder, without norm, needs twice the steps to separate phones:
    # docs/speech.md.
    "voices": {
        "encoder": {"channels": 128, "norm": "channel"},
        "context": {"context_channels": 128},
        "optimization": {"steps": 600, "batch_size": 8, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
    },
    "librispeech": {"optimization": {"epochs": 300, "batch_size": 8, "lr": 2e-4}},
    "audio-folder": {"optimization": {"epochs": 300, "batch_size": 8, "lr": 2e-4}},
    # A probe finds more phones from a small network with batch norm than from the paper's after the same minutes.
    "audio-folder-small": FEW,
}
