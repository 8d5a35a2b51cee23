"""The options of Greedy InfoMax on speech."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cpc_ext.tasks.cpc_audio import options as cpc_audio
from cpc_ext.tasks.module_options import ModulesSection, check_modules_before
from cpc_ext.tasks.speech_options import SequencePredictionSection, SpeechConfig
from cpc_ext.training.config import Preset, Presets
from cpc_ext.training.registry import title

__all__ = ["CONFIG", "PRESETS", "GreedyAudioConfig", "GreedyAudioSection"]


class GreedyAudioSection(ModulesSection):
    """The modules of Greedy InfoMax, which of them to train, and in which processes."""

    modules: Literal[1, 5, 6] = Field(
        6,
        description="Number of modules. 6: each convolution and the context network; 5: each convolution, with the "
        "context network in the last module; 1: the whole network end to end, which is CPC.",
    )
    context_per_module: bool = Field(
        False, description="Give each convolution's module a context network of its own. Needs --modules 5."
    )

    @property
    def count(self) -> int:
        """Number of modules."""
        return self.modules

    @model_validator(mode="after")
    def _options_fit(self) -> GreedyAudioSection:
        if self.context_per_module and self.modules != 5:
            raise ValueError(f"--context-per-module needs --modules 5, got {self.modules}")
        return self


class GreedyAudioConfig(SpeechConfig):
    """A run of Greedy InfoMax on speech."""

    prediction: SequencePredictionSection = Field(default_factory=SequencePredictionSection)
    greedy: GreedyAudioSection = Field(default_factory=GreedyAudioSection)

    @model_validator(mode="after")
    def _modules_fit(self) -> GreedyAudioConfig:
        check_modules_before(self.greedy, self)
        return self

    @property
    def pipeline(self) -> bool:
        return self.greedy.pipeline

    @property
    def trained_modules(self) -> int | None:
        return self.greedy.trained

    @property
    def title(self) -> str:
        return super().title if self.greedy.modules > 1 else title("cpc-audio")

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.greedy.pipeline:
            idle["gather_negatives"] = "each process of a --pipeline has the whole batch"
        return idle


CONFIG = GreedyAudioConfig

# As the published script has it.
_PUBLISHED: Preset = {"prediction": {"subsample": 128}, "optimization": {"epochs": 1000, "batch_size": 8, "lr": 2e-4}}

PRESETS: Presets = {
    # Minutes on two CPU cores.
    "voices": {
        "encoder": {"channels": 128},
        "context": {"context_channels": 128},
        "prediction": {"subsample": 128},
        "optimization": {"steps": 600, "batch_size": 8, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 50},
    },
    "librispeech": _PUBLISHED,
    "audio-folder": _PUBLISHED,
    "audio-folder-small": {**cpc_audio.FEW, "prediction": {"subsample": 128}},
}
