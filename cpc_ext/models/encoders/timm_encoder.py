"""Backbones of the timm library as encoders: each patch of an image to one feature vector.

They map patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols]:
the features that the backbone's classifier would get, pooled by the backbone's own pooling.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor, nn

from cpc_ext.models.encoders.patch_encoder import PatchEncoder

__all__ = ["STEMS", "TimmEncoder", "has_image_size"]

# First layers of a ResNet for small images in various programs: padding of a 3x3 convolution, and whether a ReLU
# follows.
STEMS = {"cifar": (1, True), "solo-learn": (2, True), "lightly": (1, False)}


class TimmEncoder(PatchEncoder):
    """A backbone of https://github.com/huggingface/pytorch-image-models by name, without its classifier.

    It starts from timm's random initialisation and has the norms that timm gives it. ``pip install 'cpc_ext[timm]'``
    brings the library.

    Args:
        name: as ``timm.create_model`` takes it, such as "resnet18" or "convnext_atto".
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.
        backbone_patch_size: timm's ``patch_size``, the side of the patches that a vision transformer cuts its input
            into; it divides the side of this encoder's patches.
        stem: first layers of a ResNet for small images: a 3x3 convolution of stride 1 without max-pooling. "cifar" as
            in the paper of SimCLR; "solo-learn" with a border of two zeros; "lightly" without ReLU, as in the networks
            of that library's ResNetGenerator, whose layers its examples take one by one. Default: as in timm.
        settings: further arguments of ``timm.create_model``. Vision transformers need ``img_size``, a patch's side.

    Attributes:
        out_channels: D, as the backbone has it.
        stem: as given.

    Raises:
        ImportError: timm is not installed, or cannot be imported; the message says why.
        ValueError: a name that timm does not know, or settings that it refuses.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        *,
        patch_size: int | None = None,
        stride: int | None = None,
        backbone_patch_size: int | None = None,
        stem: str | None = None,
        **settings: object,
    ) -> None:
        super().__init__(in_channels, patch_size=patch_size, stride=stride)
        timm = _timm()
        if backbone_patch_size is not None:
            settings["patch_size"] = backbone_patch_size
        try:
            self.backbone = timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=0, **settings)
        except Exception as error:
            # Each of the library's models checks its settings in its own way, or not at all.
            raise ValueError(f"name: timm makes no backbone {name!r} with these settings: {error}") from None
        if stem is not None:
            self._replace_stem(name, stem)
        # Some backbones have a layer between their pooled features and the classifier.
        self.stem = stem
        self.out_channels = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features

    def _replace_stem(self, name: str, stem: str) -> None:
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        first = getattr(self.backbone, "conv1", None)
        if not isinstance(first, nn.Conv2d) or not all(hasattr(self.backbone, layer) for layer in ("maxpool", "act1")):
            raise ValueError(f"stem is for ResNets that begin with one convolution and max-pooling, {name!r} does not")
        padding, relu = STEMS[stem]
        self.backbone.conv1 = nn.Conv2d(self.in_channels, first.out_channels, 3, padding=padding, bias=False)
        # The initialisation that timm has for the layer which this one replaces.
        nn.init.kaiming_normal_(self.backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.backbone.maxpool = nn.Identity()
        if not relu:
            self.backbone.act1 = nn.Identity()

    def feature_maps(self, patches: Tensor) -> Tensor:
        try:
            features: Tensor = self.backbone(patches)
        except AssertionError as error:
            size = "x".join(map(str, patches.shape[2:]))
            raise ValueError(f"the backbone takes no patches of {size} pixels: {error}") from None
        return features[..., None, None]


def has_image_size(name: str) -> bool:
    """Return whether a backbone is built for input of one size, timm's ``img_size``, as vision transformers are.

    ImportError if timm is missing or cannot be imported.
    """
    timm = _timm()
    try:
        return bool(timm.get_pretrained_cfg_value(name, "fixed_input_size"))
    except RuntimeError:
        return False  # The size belongs to the pretrained weights, which not every name has.


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ImportError(f"timm's backbones need the timm library: pip install 'cpc_ext[timm]' ({error})") from error
    except Exception as error:
        # A library that does not fit the installed PyTorch or torchvision may raise anything.
        raise ImportError(
            "timm's backbones need the timm library, which is installed but cannot be imported, often as its "
            "torchvision is not the one that fits PyTorch (beside a CPU build of PyTorch it is a CPU build, too, of "
            f"https://download.pytorch.org/whl/cpu): {type(error).__name__}: {error}"
        ) from error
