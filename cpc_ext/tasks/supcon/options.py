"""The options of SupCon (supervised contrastive learning)."""

from __future__ import annotations

from pydantic import Field, model_validator

from cpc_ext.tasks.two_view_options import TwoViewConfig, TwoViewSection, two_view_presets

__all__ = ["CONFIG", "PRESETS", "SupConConfig", "SupConSection"]


class SupConSection(TwoViewSection):
    """The networks, the views and the loss of SupCon, which learns from images with labels."""

    @model_validator(mode="after")
    def _views_are_gathered(self) -> SupConSection:
        if self.gather_negatives == "ring":
            raise ValueError("--gather-negatives ring is not for supcon, whose views of a class may be anywhere")
        return self


class SupConConfig(TwoViewConfig):
    """A run of SupCon."""

    supcon: SupConSection = Field(default_factory=SupConSection)

    @property
    def encoder_section(self) -> SupConSection:
        return self.supcon

    @property
    def learns_from_labels(self) -> bool:
        return True


CONFIG = SupConConfig
PRESETS = two_view_presets("supcon", temperature=0.1)
