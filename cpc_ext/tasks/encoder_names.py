"""Encoders by their names on the command line: which names there are, and the class and arguments each stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

from cpc_ext.training.errors import TrainingError

if TYPE_CHECKING:
    from cpc_ext.models import PatchEncoder

__all__ = ["ENCODERS", "EncoderSpec", "check_encoder_name", "encoder_name", "encoder_spec", "has_own_norm"]

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
# What may follow the name of a backbone, which may hold colons itself.
_TIMM_SETTINGS = re.compile(r":((?:img_size|patch_size)=[^,:]*(?:,.*)?)$")
# Arguments of LayerNormResNetEncoder by name.
_LAYER_NORM_RESNETS: dict[str, dict[str, Any]] = {"ln-resnet101": {}, "ln-resnet50": {"blocks": [3, 4, 6, 3]}}

# A ResNet that has no name of its own.
_OWN = "resnet"

# What is allowed: names, and patterns of names.
ENCODERS = (
    *_RESNETS,
    f"{_OWN}:blocks=N-N-N",
    *_LAYER_NORM_RESNETS,
    "wrn-DEPTH-WIDTH",
    "mobilenetv2",
    "timm:NAME",
)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ValueError(f"a positive number, got {text!r}")
    return int(text)


def _wholes(text: str) -> list[int]:
    return [_whole(part) for part in text.split("-")]


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"yes or no, got {text!r}")
    return text == "yes"


def _positive(text: str) -> float:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,4})?", text) or float(text) == 0:
        raise ValueError(f"a positive number, got {text!r}")
    return float(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in words:
            raise ValueError(f"{' or '.join(words)}, got {text!r}")
        return text

    return check


# Arguments of the classes that may follow a name, as in resnet14:stem=cifar, by how their values are read.
_RESNET_ARGUMENTS: dict[str, Callable[[str], Any]] = {
    "blocks": _wholes,
    "bottleneck": _yes,
    "channels": _wholes,
    "expansions": _wholes,
    "stem": _one_of("stl10", "cifar", "imagenet", "strided"),
    "stem_channels": _whole,
}
_MOBILENET_ARGUMENTS: dict[str, Callable[[str], Any]] = {"width": _positive, "strides": _one_of("imagenet", "cifar")}
_LAYER_NORM_ARGUMENTS: dict[str, Callable[[str], Any]] = {
    name: _RESNET_ARGUMENTS[name] for name in ("blocks", "channels", "expansions", "stem_channels")
}
# Arguments of a backbone of timm, as timm calls them.
_TIMM_ARGUMENTS: dict[str, Callable[[str], Any]] = {"img_size": _whole, "patch_size": _whole}
# Their defaults need not be written.
_DEFAULTS = {"bottleneck": False, "stem_channels": 64, "width": 1.0}


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
        import torch

        from cpc_ext.models import TimmEncoder

        try:
            encoder = self.kind(**self.arguments)
        except ImportError as error:
            raise TrainingError(f"--encoder: {error}") from None
        if self.kind is TimmEncoder:
            try:
                with torch.no_grad():
                    encoder.eval()(torch.zeros(1, 1, 1, encoder.in_channels, patch_size, patch_size))
            except Exception as error:
                # Each of the library's models refuses what it does not take in its own way.
                raise ValueError(
                    f"--encoder: {self.arguments['name']} of timm does not take patches of {patch_size} pixels: {error}"
                ) from None
            encoder.train()
        return encoder


def check_encoder_name(name: str) -> str:
    """The name itself. ValueError for one that is none of those in ``ENCODERS``, or followed by what it does not take.

    A ResNet's name may be followed by arguments of its class, "resnet14:stem=cifar"; "resnet" is one of which
    ``blocks`` and all else is given so: "resnet:blocks=1-1-2,bottleneck=yes,channels=8-16-32". A backbone of timm may
    be followed by its ``img_size`` and ``patch_size``: "timm:vit_tiny_patch16_224:patch_size=4".
    """
    if name.startswith(_TIMM) and len(name) > len(_TIMM):
        _timm_parsed(name)
        return name
    plain, arguments = _parsed(name)
    wide = _WIDE_RESNET.fullmatch(plain)
    if wide is not None:
        depth, width = map(int, wide.groups())
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(
                f"--encoder: the depth of a wide ResNet is 4 plus a positive multiple of 6, its width at least 1, as "
                f"in wrn-28-2, got {name!r}"
            )
    elif plain not in (*_RESNETS, *_LAYER_NORM_RESNETS, "mobilenetv2") and not (
        plain == _OWN and "blocks" in arguments
    ):
        raise ValueError(f"--encoder: expected one of {', '.join(ENCODERS)} (such as wrn-28-2), got {name!r}")
    return name


def has_own_norm(name: str) -> bool:
    """Whether the encoder of a name has a normalisation of its own, which none can take the place of."""
    return name.startswith((_TIMM, *_LAYER_NORM_RESNETS))


def encoder_spec(name: str, *, norm: str, in_channels: int, stem: str, patch_size: int | None = None) -> EncoderSpec:
    """The encoder of a name that :func:`check_encoder_name` has accepted.

    norm: its normalisation, unless it :func:`has_own_norm`. in_channels: channels of a patch. stem: of a
    :class:`ResNetV2Encoder`, whose names may imply their own; others take its hint at the size of a patch. patch_size:
    its side in pixels, for encoders that take patches of one size.
    """
    from cpc_ext.models import (
        LayerNormResNetEncoder,
        MobileNetV2Encoder,
        ResNetV2Encoder,
        TimmEncoder,
        WideResNetEncoder,
    )
    from cpc_ext.models.encoders.timm_encoder import has_image_size

    if name.startswith(_TIMM):
        backbone, given = _timm_parsed(name)
        settings = {"backbone_patch_size" if key == "patch_size" else key: value for key, value in given.items()}
        if patch_size is not None and "img_size" not in settings:
            with suppress(ImportError):  # Building the encoder says so.
                settings |= {"img_size": patch_size} if has_image_size(backbone) else {}
        return EncoderSpec(TimmEncoder, {"name": backbone, "in_channels": in_channels, **settings})
    plain, given = _parsed(name)
    if plain in _LAYER_NORM_RESNETS:
        arguments = {"patch_size": patch_size, "in_channels": in_channels, **_LAYER_NORM_RESNETS[plain], **given}
        return EncoderSpec(LayerNormResNetEncoder, arguments)
    arguments = {"in_channels": in_channels, "norm": norm}
    wide = _WIDE_RESNET.fullmatch(plain)
    if wide is not None:
        depth, width = map(int, wide.groups())
        return EncoderSpec(WideResNetEncoder, {"depth": depth, "width": width, **arguments})
    if plain == "mobilenetv2":
        strides = "imagenet" if stem == "imagenet" else "cifar"
        return EncoderSpec(MobileNetV2Encoder, {**arguments, "strides": strides, **given})
    return EncoderSpec(ResNetV2Encoder, {**arguments, "stem": stem, **_RESNETS.get(plain, {}), **given})


def encoder_name(kind: str, arguments: Mapping[str, Any]) -> str:
    """The name of an encoder, from the name of its class and its arguments, of which norm and channels are left out.

    KeyError for a class that no name stands for.
    """
    if kind == "TimmEncoder":
        keys = {"img_size": "img_size", "backbone_patch_size": "patch_size"}
        text = ",".join(f"{keys[key]}={value}" for key, value in arguments.items() if key in keys)
        return f"{_TIMM}{arguments['name']}" + (f":{text}" if text else "")
    if kind == "WideResNetEncoder":
        return f"wrn-{arguments['depth']}-{arguments['width']}"
    from cpc_ext.models import LayerNormResNetEncoder
    from cpc_ext.models.encoders.resnet_v2 import published_shape

    plain, known = {
        "ResNetV2Encoder": (_OWN, _RESNET_ARGUMENTS),
        "MobileNetV2Encoder": ("mobilenetv2", _MOBILENET_ARGUMENTS),
        "LayerNormResNetEncoder": ("ln-resnet101", _LAYER_NORM_ARGUMENTS),
    }[kind]
    given = {name: arguments[name] for name in known if name in arguments}
    for name, preset in _RESNETS.items():
        if kind == "ResNetV2Encoder" and "depth" in preset:
            shape = published_shape(preset["depth"])
            if all(given.get(key, value) == value for key, value in shape.items()):
                plain = name
                given = {key: value for key, value in given.items() if key not in shape}
                break
    if kind == "LayerNormResNetEncoder":
        defaults = {name: parameter.default for name, parameter in signature(LayerNormResNetEncoder).parameters.items()}
        given = {key: value for key, value in given.items() if _written(value) != _written(defaults[key])}
    text = ",".join(f"{key}={_written(value)}" for key, value in given.items() if value != _DEFAULTS.get(key))
    return f"{plain}:{text}" if text else plain


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """The name before a colon, and the arguments after it. ValueError where it takes no such arguments."""
    plain, _, rest = name.partition(":")
    known: dict[str, Callable[[str], Any]] = {}
    if plain in (*_RESNETS, _OWN):
        known = _RESNET_ARGUMENTS
    elif plain in _LAYER_NORM_RESNETS:
        known = _LAYER_NORM_ARGUMENTS
    elif plain == "mobilenetv2":
        known = _MOBILENET_ARGUMENTS
    return plain, _arguments(plain, rest, known)


def _timm_parsed(name: str) -> tuple[str, dict[str, Any]]:
    """The backbone's name in timm, and the settings after it."""
    name = name.removeprefix(_TIMM)
    found = _TIMM_SETTINGS.search(name)
    if found is None:
        return name, {}
    return name[: found.start()], _arguments(name[: found.start()], found[1], _TIMM_ARGUMENTS)


def _arguments(plain: str, rest: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The arguments in what follows a name. ValueError where it takes no such arguments."""
    arguments = {}
    for entry in filter(None, rest.split(",")):
        key, _, value = entry.partition("=")
        if key not in known:
            allowed = f"{', '.join(known)} after {plain}:" if known else f"nothing after {plain}"
            raise ValueError(f"--encoder: expected {allowed}, got {entry!r}")
        try:
            arguments[key] = known[key](value)
        except ValueError as error:
            raise ValueError(f"--encoder: {key} is {error}") from None
    return arguments


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
