"""Backbones of the timm library as encoders: each patch of an image to one feature vector.

From patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols]: the
features that the backbone's classifier would see, pooled as the backbone does it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from cpc_ext.models.encoders.patch_encoder import PatchEncoder

__all__ = ["TimmEncoder", "has_image_size"]


class TimmEncoder(PatchEncoder):
    """A backbone of https://github.com/huggingface/pytorch-image-models by name, without its classifier.

    It starts from timm's random initialisation and has the norms that timm gives it. ``pip install cpc_ext[timm]``
    brings the library.

    Args:
        name: as ``timm.create_model`` takes it, such as "resnet18" or "convnext_atto".
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.
        backbone_patch_size: timm's ``patch_size``, the side of the patches that a vision transformer cuts its input
            into: of the patches of this encoder, or a divisor of their side.
        settings: further arguments of ``timm.create_model``. Vision transformers need ``img_size``, a patch's side.

    Attributes:
        out_channels: D, as the backbone has it.

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
        # Some backbones have a layer between their pooled features and the classifier.
        self.out_channels = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features

    def feature_maps(self, patches: Tensor) -> Tensor:
        try:
            features: Tensor = self.backbone(patches)
        except AssertionError as error:
            size = "x".join(map(str, patches.shape[2:]))
            raise ValueError(f"the backbone takes no patches of {size} pixels: {error}") from None
        return features[..., None, None]


def has_image_size(name: str) -> bool:
    """Whether a backbone is built for input of one size, timm's ``img_size``, as vision transformers are.

    ImportError where timm is missing or cannot be imported.
    """
    timm = _timm()
    try:
        return bool(timm.get_pretrained_cfg_value(name, "fixed_input_size"))
    except RuntimeError:
        return False  # Noted with the pretrained weights, which not every name has.


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ImportError(f"timm's backbones need the timm library: pip install cpc_ext[timm] ({error})") from error
    except Exception as error:
        # What a library raises that fits the installed PyTorch or torchvision badly is anybody's guess.
        raise ImportError(
            "timm's backbones need the timm library, which is installed but cannot be imported, often as its "
            f"torchvision is not the one that fits PyTorch: {type(error).__name__}: {error}"
        ) from error
