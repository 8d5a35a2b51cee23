"""Trained encoders as backbones in other pipelines: feature maps of every stack for whole images, as timm's have them.

An encoder of patches averages its maps over space. Detection and segmentation need the maps of whole images themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext.models.encoders.stacked_encoder import StackedEncoder
from cpc_ext.nn.typed import Module

__all__ = ["FeatureInfo", "ImageBackbone"]

# Side in pixels of the image that the shapes of the maps are measured with.
_PROBE = 64


class FeatureInfo(list[dict[str, Any]]):
    """Descriptions of maps as in timm's backbones: a dictionary per map with "num_chs", "reduction" and "module"."""

    def channels(self) -> list[int]:
        """Return the number of channels of each map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Return the stride of each map: pixels of the image per pixel of the map, along a side."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """Return the name of the layer that outputs each map."""
        return [info["module"] for info in self]


class ImageBackbone(Module):
    """An encoder's network on whole images, floating [B, C, H, W], normalised as the encoder's view does it.

    It is called like ``timm.create_model(..., features_only=True)`` and describes its maps the same way. Its children,
    ``stem``, ``layer1`` ..., ``head``, run one after the other, so that torchvision's ``IntermediateLayerGetter`` and
    ``BackboneWithFPN`` take it, too. It shares its weights with the encoder. Batch norm, or none, treats maps of whole
    images like those of patches; instance and layer norm take their statistics over a whole image.

    Args:
        encoder: an encoder with stacks of blocks; not Lightning Bolts' one, which takes patches of one size.
        out_indices: indices of the stacks whose maps are returned; negative ones count from the end. Default: all.

    Attributes:
        num_features: channels of the last map, and features of an image.
        feature_info: :class:`FeatureInfo` of the returned maps.

    Raises:
        TypeError: an encoder of another kind; timm's are backbones themselves, ``encoder.backbone``.
        ValueError: an encoder of patches of one size, or an index that no stack has.
    """

    def __init__(self, encoder: StackedEncoder, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        if not isinstance(encoder, StackedEncoder):
            raise TypeError(f"encoder must be one of stacks of blocks, got {type(encoder).__name__}")
        count = len(encoder.layers)
        chosen = range(count) if out_indices is None else out_indices
        if any(not -count <= index < count for index in chosen):
            raise ValueError(f"out_indices must be of the {count} stacks, got {list(chosen)}")
        self.stem = _Stem(encoder)
        for index, stack in enumerate(encoder.layers):
            self.add_module(f"layer{index + 1}", stack)
        self.head = _Head(encoder)
        self.num_features = encoder.out_channels
        self._stacks = count
        self._out = sorted({index % count for index in chosen})
        for wrapper in (self, self.stem, self.head):
            wrapper.training = encoder.training
        self.feature_info = self._probed(encoder)

    def _probed(self, encoder: StackedEncoder) -> FeatureInfo:
        image = next(encoder.parameters()).new_zeros(2, encoder.in_channels, _PROBE, _PROBE)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                maps = self(image)
        except ValueError as error:
            raise ValueError(f"{type(encoder).__name__} takes no whole images: {error}") from None
        finally:
            for module in training:
                module.training = True
        return FeatureInfo(
            {"num_chs": made.shape[1], "reduction": _PROBE // made.shape[2], "module": f"layer{index + 1}"}
            for index, made in zip(self._out, maps, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps of the chosen stacks, [B, D, H / reduction, W / reduction] each; the last one after the head."""
        features = self.stem(images)
        maps = []
        for index in range(self._stacks):
            features = getattr(self, f"layer{index + 1}")(features)
            if index == self._stacks - 1:
                features = self.head(features)
            if index in self._out:
                maps.append(features)
        return maps

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map, [B, num_features, h, w]."""
        features = self.stem(images)
        for index in range(self._stacks):
            features = getattr(self, f"layer{index + 1}")(features)
        return self.head(features)

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """Average the last map over space, [B, num_features]. pre_logits: no effect, as there is no classifier."""
        return features.mean((2, 3))


class _Part(Module):
    """Some layers of an encoder as children; the encoder itself is kept, but is no child."""

    def __init__(self, encoder: StackedEncoder, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            layer = getattr(encoder, name, None)
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
        self._encoder = (encoder,)


class _Stem(_Part):
    def __init__(self, encoder: StackedEncoder) -> None:
        super().__init__(encoder, encoder.stem_layers)

    def forward(self, images: Tensor) -> Tensor:
        return self._encoder[0].stem(images)


class _Head(_Part):
    def __init__(self, encoder: StackedEncoder) -> None:
        super().__init__(encoder, encoder.head_layers)

    def forward(self, features: Tensor) -> Tensor:
        return self._encoder[0].head(features)
