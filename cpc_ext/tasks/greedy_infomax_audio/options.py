"""The options of Greedy InfoMax on speech."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpc_ext.tasks.speech_options import SequencePredictionSection, SpeechConfig
from cpc_ext.training.config import MAY_CHANGE, Preset, Presets, Section
from cpc_ext.training.registry import title

__all__ = ["CONFIG", "PRESETS", "GreedyAudioConfig", "GreedyAudioSection"]


class GreedyAudioSection(Section):
    """The modules of Greedy InfoMax, and in which order or place they learn."""

    modules: Literal[1, 5, 6] = Field(
        6,
        description="6: every convolution, and the context network, learn by themselves; 5: the context network learns "
        "with the last convolution; 1: all end to end, which is CPC.",
    )
    context_per_module: bool = Field(
        False, description="Give each convolution's module a context network of its own; with --modules 5."
    )
    train_module: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Train this module alone, counted from 0; those before it are frozen, as the run of --resume-from "
        "has trained them. None: all at once.",
    )
    pipeline: Annotated[bool, MAY_CHANGE] = Field(
        False,
        description="Under torchrun: a process, and GPU, for every module, which gets the features of the one before. "
        "Otherwise each process trains all modules on its part of a batch.",
    )

    @property
    def count(self) -> int:
        """Number of modules."""
        return self.modules

    @model_validator(mode="after")
    def _options_fit(self) -> GreedyAudioSection:
        if self.train_module is not None and self.train_module >= self.modules:
            raise ValueError(f"--train-module {self.train_module}: there are {self.modules} modules, counted from 0")
        if self.context_per_module and self.modules != 5:
            raise ValueError(f"--context-per-module needs --modules 5, got {self.modules}")
        if self.pipeline and (self.train_module is not None or self.modules == 1):
            raise ValueError("--pipeline trains several modules at a time: it needs --modules and no --train-module")
        return self


class GreedyAudioConfig(SpeechConfig):
    """A run of Greedy InfoMax on speech."""

    prediction: SequencePredictionSection = Field(default_factory=SequencePredictionSection)
    greedy: GreedyAudioSection = Field(default_factory=GreedyAudioSection)

    @model_validator(mode="after")
    def _modules_fit(self) -> GreedyAudioConfig:
        module = self.greedy.train_module
        if module and self.optimization.resume_from is None:
            raise ValueError(
                f"--train-module {module} needs --resume-from, the folder of the run that trained module {module - 1}"
            )
        return self

    @property
    def pipeline(self) -> bool:
        return self.greedy.pipeline

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
}
