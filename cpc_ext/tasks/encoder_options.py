"""Options of models that learn an encoder, and of those that do so by contrast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cpc_ext.data_sets import origin
from cpc_ext.tasks.encoder_names import ENCODER_HELP, check_encoder_name, has_own_norm
from cpc_ext.training.config import MAY_CHANGE, RunConfig, Section

__all__ = ["NORM_HELP", "ContrastSection", "EncoderConfig", "EncoderSection", "ImageProbeSection", "ProbeSection"]

Encoder = Annotated[str, AfterValidator(check_encoder_name)]
GatherNegatives = Literal["none", "gather", "ring"]
Norm = Literal["none", "layer", "batch", "instance"]

_SMALL = "resnet-small"
NORM_HELP = "Normalisation inside the encoder; a backbone of timm has its own."


class EncoderSection(Section):
    """The encoder."""

    encoder: Encoder = Field(
        "resnet14",
        description="Network that encodes a patch, or of simclr an image. "
        f"{ENCODER_HELP} What a name leaves open may follow it, as in resnet14:stem=cifar or "
        "timm:vit_tiny_patch16_224:patch_size=4.",
    )
    norm: Norm = Field("none", description=f"{NORM_HELP} The published CPC v1 uses none.")


class ContrastSection(Section):
    """What an encoding is told from."""

    gather_negatives: GatherNegatives = Field(
        "gather",
        description="Negatives of a run of several processes (torchrun). gather, also without a value: of all "
        "processes, as a single one with the whole batch has them; ring: the same, but no process holds the keys of "
        "more than one other at a time; none: each process's own.",
    )


class ProbeSection(Section):
    """What is measured of the encoder; it changes nothing of the training."""

    probe_every: Annotated[Annotated[int, Field(ge=1)] | None, MAY_CHANGE] = Field(
        None,
        description="Updates between looks at what the encoder is worth so far: how often the nearest neighbours of "
        "some held-out images, or frames of speech, are of their class. It needs labels, and its time is not counted "
        "as training. None: only at the end.",
    )


class ImageProbeSection(ProbeSection):
    """What is measured of the encoder; it changes nothing of the training."""

    probe_images: Annotated[Annotated[int, Field(ge=2)] | None, MAY_CHANGE] = Field(
        10_000,
        description="Labelled images that the linear probe at the end learns from at most; None: all. More take longer "
        "and make it better. It is tested on all test images.",
    )


class EncoderConfig(RunConfig):
    """A run that learns an encoder of images."""

    probe: ImageProbeSection = Field(default_factory=ImageProbeSection)

    @property
    def encoder_section(self) -> EncoderSection:
        """The section with the options of the encoder."""
        raise NotImplementedError

    @property
    def learns_from_labels(self) -> bool:
        """Whether the encoder learns from the labels of the training images."""
        return False

    def remedies(self) -> list[str]:
        section = self.encoder_section
        if section.norm == "none" and not has_own_norm(section.encoder):
            return ["--norm layer", *super().remedies()]
        return super().remedies()

    def shortcuts(self) -> list[str]:
        if self.encoder_section.encoder.partition(":")[0] == _SMALL:
            return super().shortcuts()
        # Small images of the user's own have defaults that suit a CPU.
        own = origin(self.data.dataset).folder in ("folders", "arrays")
        smaller = ["--image-size 32, for whose defaults a processor is enough"] if own else []
        return [*super().shortcuts(), f"--encoder {_SMALL}", *smaller]

    def idle(self) -> dict[str, str]:
        encoder = self.encoder_section.encoder
        idle = super().idle()
        if has_own_norm(encoder):
            idle["norm"] = f"--encoder {encoder} has a normalisation of its own"
        if not self.output.evaluate:
            idle["probe_images"] = "--no-evaluate measures nothing at the end"
        return idle
