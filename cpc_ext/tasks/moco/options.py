"""The options of MoCo."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from cpc_ext.tasks.two_view_options import TwoViewConfig, TwoViewSection, two_view_presets

__all__ = ["CONFIG", "PRESETS", "MoCoConfig", "MoCoSection"]


class MoCoSection(TwoViewSection):
    """The networks, the views and the queue of MoCo."""

    queue_size: int = Field(
        65536, ge=1, le=2**24, description="Number of keys of earlier batches in the queue, which are the negatives."
    )
    key_momentum: float = Field(
        0.999, ge=0, lt=1, description="Fraction of the key networks' weights that an update keeps (momentum)."
    )

    @model_validator(mode="after")
    def _queue_has_keys_of_all(self) -> MoCoSection:
        if self.gather_negatives == "ring":
            raise ValueError(
                "--gather-negatives ring is not for moco, whose queues hold the keys of all processes or of one"
            )
        return self


class MoCoConfig(TwoViewConfig):
    """A run of MoCo."""

    # The queue holds keys of other images.
    least_images: ClassVar[int] = 1

    moco: MoCoSection = Field(default_factory=MoCoSection)

    @property
    def encoder_section(self) -> MoCoSection:
        return self.moco


CONFIG = MoCoConfig
# Version 2's temperature, and those settings of its optimization that do not depend on the size of the data.
_PUBLISHED = two_view_presets(
    "moco", {"optimizer": "sgd", "lr": 0.03, "final_lr": 0.0}, temperature=0.2, head_norm=False
)
# In a run of 850 updates keys become outdated sooner, so the queue is shorter and the key networks follow faster.
_SHORT = two_view_presets("moco", temperature=0.2, queue_size=1024, key_momentum=0.99)
_SMALL = two_view_presets("moco", temperature=0.2, queue_size=4096, key_momentum=0.99)
PRESETS = {**_PUBLISHED, "textures": _SHORT["textures"], "folder-small": _SMALL["folder-small"]}
