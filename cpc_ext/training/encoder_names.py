"""Encoders by their names on the command line: which names there are, and the class and arguments each stands for."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from cpc_ext.models import MobileNetV2Encoder, PatchEncoder, ResNetV2Encoder, TimmEncoder, WideResNetEncoder
from cpc_ext.training.errors import TrainingError

__all__ = ["ENCODERS", "EncoderSpec", "check_encoder_name", "encoder_spec"]

# Arguments of ResNetV2Encoder by name.
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet-small": {"blocks": (1, 1, 1), "channels": (32, 64, 128), "stem_channels": 32, "stem": "strided"},
    "resnet14": {"depth": 14},
    "resnet28": {"depth": 28},
    "resnet41": {"depth": 41},
    "resnet92": {"depth": 92},
    "resnet143": {"depth": 143},
    "resnet161": {"depth": 161},
    "resnet18": {"depth": 18},
    "resnet34": {"depth": 34},
    "resnet50": {"depth": 50},
    "resnet101": {"depth": 101},
    "resnet152": {"depth": 152},
}
_WIDE_RESNET = re.compile(r"wrn-(\d{1,4})-(\d{1,4})")
_TIMM = "timm:"

# What is allowed: names, and patterns of names.
ENCODERS = (*_RESNETS, "wrn-DEPTH-WIDTH", "mobilenetv2", "timm:NAME")


class EncoderSpec(NamedTuple):
    """What an encoder is built from.

    kind: its class, of :mod:`cpc_ext.models`.
    arguments: of the class, by keyword; JSON values.
    """

    kind: type[PatchEncoder]
    arguments: dict[str, Any]

    def build(self, patch_size: int) -> PatchEncoder:
        """The encoder with new weights, for patches of that many pixels a side.

        TrainingError, ValueError where timm is not installed, does not know the name, or its backbone takes no such
        patches; our own take all.
        """
        try:
            encoder = self.kind(**self.arguments)
        except ImportError as error:
            raise TrainingError(f"--encoder: {error}") from None
        if self.kind is TimmEncoder:
            try:
                with torch.no_grad():
                    encoder.eval()(torch.zeros(1, 1, 1, encoder.in_channels, patch_size, patch_size))
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"--encoder: {self.arguments['name']} of timm does not take patches of {patch_size} pixels: {error}"
                ) from None
            encoder.train()
        return encoder


def check_encoder_name(name: str) -> str:
    """The name itself. ValueError for one that is none of those in ``ENCODERS``."""
    wide = _WIDE_RESNET.fullmatch(name)
    if wide is not None:
        depth, width = map(int, wide.groups())
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(
                f"--encoder: the depth of a wide ResNet is 4 plus a positive multiple of 6, its width at least 1, as "
                f"in wrn-28-2, got {name!r}"
            )
    elif name not in (*_RESNETS, "mobilenetv2") and not (name.startswith(_TIMM) and len(name) > len(_TIMM)):
        raise ValueError(f"--encoder: expected one of {', '.join(ENCODERS)} (such as wrn-28-2), got {name!r}")
    return name


def encoder_spec(name: str, *, norm: str, in_channels: int, stem: str) -> EncoderSpec:
    """The encoder of a name that :func:`check_encoder_name` has accepted.

    norm: its normalisation; timm's backbones have their own. in_channels: channels of a patch. stem: of a
    :class:`ResNetV2Encoder`, whose names may imply their own; others take its hint at the size of a patch.
    """
    if name.startswith(_TIMM):
        return EncoderSpec(TimmEncoder, {"name": name.removeprefix(_TIMM), "in_channels": in_channels})
    arguments = {"in_channels": in_channels, "norm": norm}
    wide = _WIDE_RESNET.fullmatch(name)
    if wide is not None:
        depth, width = map(int, wide.groups())
        return EncoderSpec(WideResNetEncoder, {"depth": depth, "width": width, **arguments})
    if name == "mobilenetv2":
        strides = "imagenet" if stem == "imagenet" else "cifar"
        return EncoderSpec(MobileNetV2Encoder, {**arguments, "strides": strides})
    return EncoderSpec(ResNetV2Encoder, {**arguments, "stem": stem, **_RESNETS[name]})
