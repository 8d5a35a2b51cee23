"""The options of Greedy InfoMax, and of the supervised encoders that it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpc_ext.tasks.cpc_v1 import options as cpc_v1
from cpc_ext.tasks.module_options import ModulesSection, check_modules_before
from cpc_ext.training.config import Presets
from cpc_ext.training.registry import title

__all__ = ["CONFIG", "PRESETS", "GreedyConfig", "GreedySection"]


class GreedySection(ModulesSection):
    """The modules of Greedy InfoMax, their objective, which of them to train, and in which processes."""

    modules: int = Field(
        3,
        ge=1,
        le=1000,
        description="Number of modules that the encoder's stacks are divided into, each with a loss of its own. 1: the "
        "encoder end to end, with a context network, which is CPC.",
    )
    split_at: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="Index of the first block of each module but the first, counted from 0 over all stacks. Replaces "
        "--modules.",
    )
    objective: Literal["infonce", "supervised"] = Field(
        "infonce",
        description="Loss of each module: InfoNCE, or the cross-entropy of the labels from a linear classifier of its "
        "own (with --modules 1: a supervised encoder, trained end to end).",
    )
    init: Literal["he", "delta-orthogonal"] = Field(
        "he",
        description="Initial weights of the encoder: He et al.'s, or Xiao et al. 2018's, arXiv 1806.05393.",
    )
    cache_outputs: Path | None = Field(
        None,
        description="Folder for a cache of the frozen modules' outputs, which are computed once and then read from "
        "disk. This fixes the crops: --cache-views of each image. None: compute them in every step, for new crops.",
    )
    cache_views: int = Field(
        1, ge=1, description="Number of random crops of each image that --cache-outputs caches the outputs of."
    )

    @property
    def count(self) -> int:
        """Number of modules."""
        return self.modules if self.split_at is None else len(self.split_at) + 1

    @model_validator(mode="after")
    def _options_fit(self) -> GreedySection:
        if self.cache_outputs is not None and not self.train_module:
            raise ValueError("--cache-outputs needs --train-module 1 or higher: only frozen modules are cached")
        return self


# Options of the prediction of patches and of its negatives.
_OF_PREDICTION = ("pred_steps", "pred_directions", "skip", "neg_samples", "gather_negatives")


class GreedyConfig(cpc_v1.CPCConfig):
    """A run of Greedy InfoMax, or of the supervised encoders it is compared with."""

    greedy: GreedySection = Field(default_factory=GreedySection)

    @model_validator(mode="after")
    def _modules_before_are_trained(self) -> GreedyConfig:
        check_modules_before(self.greedy, self)
        return self

    @property
    def pipeline(self) -> bool:
        return self.greedy.pipeline

    @property
    def predicts(self) -> bool:
        return self.greedy.objective != "supervised"

    @property
    def trained_modules(self) -> int | None:
        return self.greedy.trained

    @property
    def learns_from_labels(self) -> bool:
        return not self.predicts

    @property
    def title(self) -> str:
        """Name of the run's model in figures; an encoder trained end to end is called CPC."""
        several = self.greedy.count > 1
        if self.greedy.objective == "supervised":
            return "supervised, greedy" if several else "supervised, end to end"
        return super().title if several else title("cpc-v1")

    def idle(self) -> dict[str, str]:
        greedy, idle = self.greedy, super().idle()
        if greedy.split_at is not None:
            idle["modules"] = "--split-at tells how many there are"
        if greedy.cache_outputs is None:
            idle["cache_views"] = "it needs --cache-outputs"
        if greedy.count > 1:
            idle["context_layers"] = "only a single module has a context network"
        if greedy.pipeline:
            idle["gather_negatives"] = "each process of a --pipeline has the whole batch"
        if not self.predicts:
            nothing = "--objective supervised predicts no patches"
            idle |= dict.fromkeys((*_OF_PREDICTION, "context_layers"), nothing)
        if self.optimization.resume_from is not None:
            idle["init"] = "--resume-from brings the weights"
        return idle


CONFIG = GreedyConfig

PRESETS: Presets = {
    **cpc_v1.PRESETS,
    # The published settings: ResNet-50 v2 without its last stack and without norm.
    "stl10": {
        "view": {"crop": 64, "grid_size": 7},
        "cpc": {"encoder": "resnet41", "pred_steps": 5, "neg_samples": 16},
        "optimization": {"epochs": 300, "batch_size": 32, "lr": 1.5e-4},
    },
    # A single narrow block is too small a module to learn by itself: three of them cost four points of a linear probe.
    "folder-small": {**cpc_v1.PRESETS["folder-small"], "greedy": {"modules": 2}},
}
