"""The options of SimCLR."""

from __future__ import annotations

from pydantic import Field

from cpc_ext.tasks.two_view_options import TwoViewConfig, TwoViewSection, two_view_presets

__all__ = ["CONFIG", "PRESETS", "SimCLRConfig", "SimCLRSection"]


class SimCLRSection(TwoViewSection):
    """The networks, the views and the loss of SimCLR."""


class SimCLRConfig(TwoViewConfig):
    """A run of SimCLR."""

    simclr: SimCLRSection = Field(default_factory=SimCLRSection)

    @property
    def encoder_section(self) -> SimCLRSection:
        return self.simclr


CONFIG = SimCLRConfig
# Smaller views leave time for more of them (docs/simclr.md). This was not measured for the other two-view models.
_SMALL = two_view_presets("simclr", view_size=20, center_scale=1.6)
PRESETS = {**two_view_presets("simclr"), "folder-small": _SMALL["folder-small"]}
