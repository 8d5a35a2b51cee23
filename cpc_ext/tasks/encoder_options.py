"""Options of models that learn an encoder, and of models with a contrastive loss."""

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
NORM_HELP = "Normalisation inside the encoder; timm backbones have their own."


class EncoderSection(Section):
    """The encoder."""

    encoder: Encoder = Field(
        "resnet14",
        description="Network that encodes a patch, or a whole image for simclr, moco and supcon. "
        f"{ENCODER_HELP} Further arguments may follow the name after a colon, as in resnet14:stem=cifar or "
        "timm:vit_tiny_patch16_224:patch_size=4.",
    )
    norm: Norm = Field("none", description=f"{NORM_HELP} The published CPC v1 uses none.")


class ContrastSection(Section):
    """The negatives of a contrastive loss."""

    gather_negatives: GatherNegatives = Field(
        "gather",
        description="Negatives in a run of several processes (torchrun). gather, also if the option has no value: the "
        "negatives of all processes, as in a single process with the whole batch; ring: the same, but no process holds "
        "the keys of more than one other process at a time; none: only the process's own.",
    )


class ProbeSection(Section):
    """Measurements of the encoder, which do not affect the training."""

    probe_every: Annotated[Annotated[int, Field(ge=1)] | None, MAY_CHANGE] = Field(
        None,
        description="Number of updates between measurements of the encoder during training: the accuracy of a "
        "nearest-neighbour classifier that finds the class of some held-out images, or the phone of frames of speech. "
        "This needs labels, and its time does not count as training time. None: no measurements before the end.",
    )


class ImageProbeSection(ProbeSection):
    """Measurements of the encoder, which do not affect the training."""

    probe_images: Annotated[Annotated[int, Field(ge=2)] | None, MAY_CHANGE] = Field(
        10_000,
        description="Maximum number of labelled images that the linear probe at the end learns from. None: all. More "
        "images take longer and improve the probe. It is tested on all test images.",
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
        """True if the encoder learns from the labels of the training images."""
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
