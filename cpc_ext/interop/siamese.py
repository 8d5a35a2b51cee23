"""Conversion of siamese networks such as SimCLR's: one of torchvision's ResNets, without the projection heads.

The programs differ in the prefix of the ResNet and in its stem for small images. The layers have torchvision's names,
or numbers if a program puts them into a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.names import NameMap, under, with_prefix
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Form, Program, Reference, Settings, put_weights
from cpc_ext.interop.torchvision_resnets import check_resnet, resnet_name
from cpc_ext.models import SimCLR, TimmEncoder

__all__ = ["SiameseProgram"]


def _names(stem: tuple[str, str], stacks: tuple[str, ...], shortcut: str) -> NameMap:
    """Return the map between a program's names of a ResNet's layers and torchvision's."""
    pairs = list(zip(stem, ("conv1", "bn1"), strict=True))
    for number, stack in enumerate(stacks, start=1):
        pairs += [
            (f"{stack}.{{block}}.{shortcut}.{{index}}", f"layer{number}.{{block}}.downsample.{{index}}"),
            (f"{stack}.{{block}}.{{layer}}", f"layer{number}.{{block}}.{{layer}}"),
        ]
    return NameMap((f"{theirs}.{{parameter}}", f"{ours}.{{parameter}}") for theirs, ours in pairs)


_LAYOUTS = {
    "names": _names(("conv1", "bn1"), ("layer1", "layer2", "layer3", "layer4"), "downsample"),
    # ReLU and max-pooling take the numbers 2 and 3.
    "numbers": _names(("0", "1"), ("4", "5", "6", "7"), "downsample"),
    # The ResNet of lightly's ResNetGenerator, which has no layers for ReLU and max-pooling.
    "generator": _names(("0", "1"), ("2", "3", "4", "5"), "shortcut"),
}
# Kernel size of the first convolution for small images.
_SMALL = 3


class SiameseProgram(Program):
    """A program whose checkpoints hold a ResNet; tensors without the ResNet's prefix are kept beside the model.

    A form's layout is one of ``_LAYOUTS``, a space, and the prefix.

    Attributes:
        prefixes: possible prefixes of the ResNet's names, which differ between versions of the program.
        stem: the stem of :class:`~cpc_ext.models.TimmEncoder` for a first convolution of 3x3.
        small_stems: the stems for small images with which the program itself builds networks.
        layout: the layout of names in the program's own examples.
        sizes: sides of images in the program's examples, in pixels, with and without a stem for small images.
    """

    settings = frozenset(("image_size",))
    prefixes: ClassVar[tuple[str, ...]] = ("backbone.",)
    stem: ClassVar[str] = "cifar"
    small_stems: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[str] = "names"
    sizes: ClassVar[tuple[int, int]] = (32, 224)

    def knows(self, name: str) -> bool:
        return any(
            names.ours(name.removeprefix(prefix))
            for prefix in self.prefixes
            if name.startswith(prefix)
            for names in _LAYOUTS.values()
        )

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        state = checkpoint.merged()
        prefix = next((each for each in self.prefixes if any(name.startswith(each) for name in state)), None)
        if prefix is None:
            raise self.refuse(checkpoint, list(state))
        network = under(state, prefix)
        layout = "names"
        if "0.weight" in network:
            layout = "generator" if any(name.startswith("2.") for name in network) else "numbers"
        heads = {name: value for name, value in network.items() if name.startswith("fc.")}
        names = _LAYOUTS[layout]
        unknown = [prefix + name for name in network if name not in heads and names.ours(name) is None]
        if unknown:
            raise self.refuse(checkpoint, unknown)
        weights = {str(names.ours(name)): value for name, value in network.items() if name not in heads}
        try:
            arguments: dict[str, Any] = {"name": resnet_name(weights), "in_channels": weights["conv1.weight"].shape[1]}
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.origin}: of {self.source}'s backbones only torchvision's ResNets are known, this one "
                f"{error}"
            ) from None
        small = weights["conv1.weight"].shape[2] == _SMALL
        if small:
            arguments["stem"] = "lightly" if layout == "generator" else self.stem
        encoder = TimmEncoder(**arguments)
        put_weights(
            encoder,
            with_prefix("backbone.", weights),
            lambda name: prefix + (names.theirs(name.removeprefix("backbone.")) or name),
            checkpoint.origin,
        )
        size = settings.image_size or self.sizes[0 if small else 1]
        configuration = {
            "kind": "image-encoder",
            "encoder": {"class": "TimmEncoder", "arguments": arguments},
            "image_shape": [arguments["in_channels"], size, size],
        }
        unused = {name: value for name, value in state.items() if not name.startswith(prefix)}
        assumed = () if settings.image_size else (f"image_size {size}",)
        form = Form(f"{layout} {prefix}", unused | with_prefix(prefix, heads))
        return Reference(self.source, encoder, configuration, assumed, form)

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        encoder = model.encoder if isinstance(model, SimCLR) else model
        if not isinstance(encoder, TimmEncoder):
            raise CheckpointError(
                f"{self.source} has no model like a {type(encoder).__name__}: it has ResNets, as --encoder "
                "timm:resnet18 and its like train them"
            )
        weights = encoder.backbone.state_dict()
        try:
            check_resnet(encoder)
        except ValueError as error:
            raise CheckpointError(f"{self.source} has torchvision's ResNets, this encoder {error}") from None
        layout, prefix = (self.layout, self.prefixes[0])
        if form is not None:
            layout, _, prefix = form.layout.partition(" ")
        elif encoder.stem not in (None, *self.small_stems):
            raise CheckpointError(f"{self.source} has no stem like {encoder.stem}'s")
        elif encoder.stem == "lightly":
            layout = "generator"
        state = self._renamed(weights, _LAYOUTS[layout])
        return with_prefix(prefix, state) | ({} if form is None else form.unused)

    def _renamed(self, weights: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
        unknown = [name for name in weights if names.theirs(name) is None]
        if unknown:
            raise CheckpointError(f"{self.source} has torchvision's ResNets, which have no {unknown[0]}")
        return {str(names.theirs(name)): value for name, value in weights.items()}
