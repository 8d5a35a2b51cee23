"""Options of the models that predict patches of an image from others: the grid of patches, and the predictions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cpc_ext.tasks.encoder_options import ContrastSection, EncoderConfig, EncoderSection
from cpc_ext.training.config import MOST, Section

__all__ = ["PredictionConfig", "PredictionSection", "ViewSection"]


class ViewSection(Section):
    """The model's input: a crop of an image, cut into a grid of overlapping patches."""

    crop: int = Field(
        56, ge=4, le=MOST, description="Side in pixels of the square cut out of an image at a random place."
    )
    pad: int = Field(0, ge=0, le=MOST, description="Width in pixels of the black border added before cropping.")
    grid_size: int = Field(6, ge=2, le=MOST, description="Patches along a side of the grid.")
    patch_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Side of a patch in pixels. None: neighbours overlap by half, 2 * crop / (grid size + 1)."
    )
    flip: bool = Field(True, description="Mirror half of the crops left to right.")
    gray: bool = Field(
        True, description="Convert images to grey, so that the model cannot take the shortcut of matching colours."
    )
    patch_norm: bool = Field(
        False,
        description="Normalise each patch to zero mean and unit contrast, so that the model cannot take the shortcut "
        "of matching brightness. Otherwise pixels are normalised by the data set's mean and standard deviation.",
    )
    patch_augmentation: bool = Field(
        False,
        description="Augment each patch independently during training, as in CPC v2: two of AutoAugment's transforms; "
        "then, with the paper's probabilities, elastic deformation, another colour histogram, colour jitter and "
        "conversion to grey; then a crop that is padded back to the patch size.",
    )

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return 2 * self.crop // (self.grid_size + 1) if self.patch_size is None else self.patch_size

    @property
    def stride(self) -> int:
        """Distance between neighbouring patches in pixels."""
        return (self.crop - self.patch) // (self.grid_size - 1)

    @model_validator(mode="after")
    def _grid_fills_crop(self) -> ViewSection:
        if self.patch_size is None and 2 * self.crop % (self.grid_size + 1):
            fitting = self.crop - self.crop % (self.grid_size + 1)
            raise ValueError(
                f"--crop {self.crop} does not divide into half-overlapping patches on a {self.grid_size} x "
                f"{self.grid_size} grid: use a multiple of {self.grid_size + 1} such as "
                f"{fitting or self.grid_size + 1}, or give --patch-size"
            )
        if self.patch > self.crop:
            raise ValueError(f"--patch-size {self.patch} is larger than --crop {self.crop}")
        if self.stride < 1 or self.patch + self.stride * (self.grid_size - 1) != self.crop:
            raise ValueError(
                f"--patch-size {self.patch} on a {self.grid_size} x {self.grid_size} grid does not fill --crop "
                f"{self.crop}: crop - patch size must be a positive multiple of grid size - 1 = {self.grid_size - 1}"
            )
        return self


class PredictionSection(ContrastSection, EncoderSection):  # Fields of the last base class come first.
    """Options that both versions of contrastive predictive coding share."""

    context_layers: int = Field(
        4, ge=1, le=1000, description="Number of layers of the context network; each one sees one row further up."
    )
    pred_steps: int = Field(5, ge=1, description="Number of rows ahead to predict, from the nearest to the farthest.")
    pred_directions: int = Field(
        1,
        ge=1,
        le=4,
        description="Number of directions to predict in: 1 is down; each further one turns the grid by 90 degrees.",
    )
    skip: int = Field(
        1,
        ge=0,
        description="Number of rows between a context and its first target that are left out, because their patches "
        "overlap the context's.",
    )


class PredictionConfig(EncoderConfig):
    """A run of a model that predicts patches."""

    view: ViewSection = Field(default_factory=ViewSection)
    cpc: PredictionSection

    @model_validator(mode="after")
    def _predictions_fit_grid(self) -> PredictionConfig:
        if not self.predicts:
            return self
        farthest, last = self.cpc.pred_steps + self.cpc.skip, self.view.grid_size - 1
        if farthest > last:
            raise ValueError(
                f"--pred-steps {self.cpc.pred_steps} with --skip {self.cpc.skip} predicts {farthest} rows ahead, but "
                f"--grid-size {self.view.grid_size} has only {last} rows below the first: they may sum to {last}"
            )
        return self

    @property
    def predicts(self) -> bool:
        """True if the model learns by predicting patches."""
        return True

    @property
    def encoder_section(self) -> EncoderSection:
        return self.cpc

    def remedies(self) -> list[str]:
        milder = ["--no-patch-augmentation"] if self.view.patch_augmentation else []
        return [*super().remedies(), *milder]
