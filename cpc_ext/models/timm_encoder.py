"""Backbones of the timm library as encoders: each patch of an image to one feature vector.

From patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols]: the
features that the backbone's classifier would see, pooled as the backbone does it.
"""

from __future__ import annotations

from torch import Tensor

from cpc_ext.models.patch_encoder import PatchEncoder

__all__ = ["TimmEncoder"]


class TimmEncoder(PatchEncoder):
    """A backbone of https://github.com/huggingface/pytorch-image-models by name, without its classifier.

    It starts from timm's random initialisation and has the norms that timm gives it. ``pip install cpc_ext[timm]``
    brings the library.

    Args:
        name: as ``timm.create_model`` takes it, such as "resnet18" or "convnext_atto".
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.
        settings: further arguments of ``timm.create_model``. Vision transformers need ``img_size``, a patch's side.

    Attributes:
        out_channels: D, as the backbone has it.

    Raises:
        ImportError: timm is not installed.
        ValueError: a name that timm does not know, or settings that it refuses.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        *,
        patch_size: int | None = None,
        stride: int | None = None,
        **settings: object,
    ) -> None:
        super().__init__(in_channels, patch_size=patch_size, stride=stride)
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"timm's backbones need the timm library: pip install cpc_ext[timm] ({error})") from error
        try:
            self.backbone = timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=0, **settings)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"name: timm makes no backbone {name!r} with these settings: {error}") from None
        # Some backbones have a layer between their pooled features and the classifier.
        self.out_channels = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features

    def feature_maps(self, patches: Tensor) -> Tensor:
        try:
            return self.backbone(patches)[..., None, None]
        except AssertionError as error:
            size = "x".join(map(str, patches.shape[2:]))
            raise ValueError(f"the backbone takes no patches of {size} pixels: {error}") from None
