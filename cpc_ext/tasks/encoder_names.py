"""Names of encoders on the command line, and the class and arguments that each stands for.

Each encoder class has a family, which defines the names of its encoders.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cpc_ext.training.errors import TrainingError

if TYPE_CHECKING:
    from cpc_ext.models import PatchEncoder

__all__ = [
    "ENCODERS",
    "ENCODER_HELP",
    "EncoderSpec",
    "check_encoder_name",
    "encoder_name",
    "encoder_spec",
    "has_own_norm",
    "takes_one_size",
]


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


class EncoderSpec(NamedTuple):
    """The class and arguments that an encoder is built from.

    kind: class in :mod:`cpc_ext.models`.
    arguments: keyword arguments of the class, as JSON values.
    """

    kind: type[PatchEncoder]
    arguments: dict[str, Any]

    def build(self, patch_size: int) -> PatchEncoder:
        """Build the encoder with new weights, for patches of ``patch_size`` pixels a side.

        TrainingError if timm is not installed; ValueError if it does not know the name, or if its backbone does not
        take patches of this size. The size is checked for timm's backbones only.
        """
        import torch

        from cpc_ext.models import TimmEncoder

        try:
            encoder = self.kind(**self.arguments)
        except ImportError as error:
            raise TrainingError(f"--encoder: {error}") from None
        except ValueError as error:  # The class calls the argument "name"; here it is the option.
            raise ValueError(f"--encoder: {str(error).removeprefix('name: ')}") from None
        if self.kind is TimmEncoder:
            try:
                with torch.no_grad():
                    encoder.eval()(torch.zeros(1, 1, 1, encoder.in_channels, patch_size, patch_size))
            except Exception as error:
                # The library's models raise various exceptions for sizes that they do not take.
                raise ValueError(
                    f"--encoder: {self.arguments['name']} of timm does not take patches of {patch_size} pixels: {error}"
                ) from None
            encoder.train()
        return encoder


class _Seen(NamedTuple):
    """The arguments of :func:`encoder_spec` other than the name."""

    norm: str
    in_channels: int
    stem: str
    patch_size: int | None


class _Family(ABC):
    """The names of the encoders of one class.

    Attributes:
        kind: the class, of :mod:`cpc_ext.models`.
        shown: names, and patterns of names, as messages show them.
        help: what the names stand for.
        takes: parsers of the arguments that may follow a name, as in resnet14:stem=cifar, by argument of the class.
        own_norm: whether the class has a built-in normalisation that cannot be replaced.
    """

    kind: ClassVar[str]
    shown: ClassVar[tuple[str, ...]]
    help: ClassVar[str]
    takes: ClassVar[dict[str, Callable[[str], Any]]] = {}
    own_norm: ClassVar[bool] = False

    def parsed(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """Split a name into the part before a colon and the arguments after it; None for a name of another family.

        ValueError if the name takes no such arguments.
        """
        plain, _, rest = name.partition(":")
        return (plain, _arguments(plain, rest, self.takes)) if self.has(plain) else None

    def one_size(self, plain: str) -> bool:
        """Return whether the encoder of a name without arguments takes only inputs of the size it is built for."""
        return False

    @abstractmethod
    def has(self, plain: str) -> bool:
        """Return whether a name without arguments belongs to the family."""

    @abstractmethod
    def arguments(self, plain: str, given: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        """Return the arguments of the class."""

    @abstractmethod
    def name(self, arguments: Mapping[str, Any]) -> str:
        """Return the name of the encoder with these arguments, without norm and channels."""


class _ResNets(_Family):
    _OWN = "resnet"  # The base of names of encoders that are not published ones.
    _PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {
        "resnet-small": {"blocks": (1, 1, 1), "channels": (32, 64, 128), "stem_channels": 32, "stem": "strided"},
        **{f"resnet{depth}": {"depth": depth} for depth in (14, 28, 41, 92, 143, 161, 18, 34, 50, 101, 152)},
    }

    kind = "ResNetV2Encoder"
    shown = (*_PUBLISHED, f"{_OWN}:blocks=N-N-N")
    help = (
        "resnetN: a pre-activation ResNet. N = 14, 28, 41, 92, 143: without the last stack, as published for CPC; 161: "
        "that of CPC v2; 18, 34, 50, 101, 152: complete. resnet-small: one narrow block per stack."
    )
    takes: ClassVar = {
        "blocks": _wholes,
        "bottleneck": _yes,
        "channels": _wholes,
        "expansions": _wholes,
        "stem": _one_of("stl10", "cifar", "imagenet", "strided"),
        "stem_channels": _whole,
    }

    def has(self, plain: str) -> bool:
        return plain in (*self._PUBLISHED, self._OWN)

    def parsed(self, name: str) -> tuple[str, dict[str, Any]] | None:
        found = super().parsed(name)
        if found is not None and found[0] == self._OWN and "blocks" not in found[1]:
            raise _no_such(name)
        return found

    def arguments(self, plain: str, given: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        known = self._PUBLISHED.get(plain, {})
        return {"in_channels": seen.in_channels, "norm": seen.norm, "stem": seen.stem, **known, **given}

    def name(self, arguments: Mapping[str, Any]) -> str:
        from cpc_ext.models.encoders.resnet_v2 import published_shape

        given = {name: arguments[name] for name in self.takes if name in arguments}
        for name, known in self._PUBLISHED.items():
            shape = published_shape(known["depth"]) if "depth" in known else None
            if shape is not None and all(given.get(key, value) == value for key, value in shape.items()):
                return _with_arguments(name, {key: value for key, value in given.items() if key not in shape})
        return _with_arguments(self._OWN, given)


class _LayerNormResNets(_Family):
    _PUBLISHED: ClassVar[dict[str, dict[str, Any]]] = {"ln-resnet101": {}, "ln-resnet50": {"blocks": [3, 4, 6, 3]}}

    kind = "LayerNormResNetEncoder"
    shown = tuple(_PUBLISHED)
    help = "ln-resnet101: Lightning Bolts' cpc_encoder."
    takes: ClassVar = {name: _ResNets.takes[name] for name in ("blocks", "channels", "expansions", "stem_channels")}
    own_norm = True

    def has(self, plain: str) -> bool:
        return plain in self._PUBLISHED

    def one_size(self, plain: str) -> bool:
        return True

    def arguments(self, plain: str, given: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        return {"patch_size": seen.patch_size, "in_channels": seen.in_channels, **self._PUBLISHED[plain], **given}

    def name(self, arguments: Mapping[str, Any]) -> str:
        from cpc_ext.models import LayerNormResNetEncoder

        defaults = {name: parameter.default for name, parameter in signature(LayerNormResNetEncoder).parameters.items()}
        given = {name: arguments[name] for name in self.takes if name in arguments}
        other = {key: value for key, value in given.items() if _written(value) != _written(defaults[key])}
        return _with_arguments("ln-resnet101", other)


class _WideResNets(_Family):
    _NAME = re.compile(r"wrn-(\d{1,4})-(\d{1,4})")

    kind = "WideResNetEncoder"
    shown = ("wrn-DEPTH-WIDTH",)
    help = "wrn-DEPTH-WIDTH: a wide ResNet, such as wrn-28-2."

    def has(self, plain: str) -> bool:
        return self._NAME.fullmatch(plain) is not None

    def parsed(self, name: str) -> tuple[str, dict[str, Any]] | None:
        found = super().parsed(name)
        if found is not None:
            depth, width = self._sizes(found[0])
            if depth < 10 or (depth - 4) % 6 or width < 1:
                raise ValueError(
                    "--encoder: the depth of a wide ResNet is 4 plus a positive multiple of 6, its width at least 1, "
                    f"as in wrn-28-2, got {name!r}"
                )
        return found

    def arguments(self, plain: str, given: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        depth, width = self._sizes(plain)
        return {"depth": depth, "width": width, "in_channels": seen.in_channels, "norm": seen.norm}

    def name(self, arguments: Mapping[str, Any]) -> str:
        return f"wrn-{arguments['depth']}-{arguments['width']}"

    def _sizes(self, plain: str) -> tuple[int, int]:
        _, depth, width = plain.split("-")
        return int(depth), int(width)


class _MobileNets(_Family):
    _ONE = "mobilenetv2"

    kind = "MobileNetV2Encoder"
    shown = (_ONE,)
    help = "mobilenetv2: a MobileNetV2."
    takes: ClassVar = {"width": _positive, "strides": _one_of("imagenet", "cifar")}

    def has(self, plain: str) -> bool:
        return plain == self._ONE

    def arguments(self, plain: str, given: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        strides = "imagenet" if seen.stem == "imagenet" else "cifar"
        return {"in_channels": seen.in_channels, "norm": seen.norm, "strides": strides, **given}

    def name(self, arguments: Mapping[str, Any]) -> str:
        return _with_arguments(self._ONE, {name: arguments[name] for name in self.takes if name in arguments})


class _Timm(_Family):
    _PREFIX = "timm:"
    # The arguments after the name of a backbone; the name itself may hold colons, but no "=".
    _SETTINGS = re.compile(r":(\w+=[^,:]*(?:,.*)?)$")
    # Arguments by timm's names, which the command line uses, and by the names of the class.
    _KEYS: ClassVar = {
        "img_size": "img_size",
        "patch_size": "backbone_patch_size",
        "stem": "stem",
        "global_pool": "global_pool",
    }

    kind = "TimmEncoder"
    shown = (f"{_PREFIX}NAME",)
    help = "timm:NAME: any backbone of the timm library, if installed (cpc_ext[timm]), such as timm:convnext_atto."
    takes: ClassVar = {
        "img_size": _whole,
        "patch_size": _whole,
        "stem": _one_of("cifar", "solo-learn", "lightly"),
        "global_pool": _one_of("avg", "max", "avgmax", "token", "map"),
    }
    own_norm = True

    def has(self, plain: str) -> bool:
        return plain.startswith(self._PREFIX) and plain != self._PREFIX

    def parsed(self, name: str) -> tuple[str, dict[str, Any]] | None:
        if not self.has(name):
            return None
        backbone = name.removeprefix(self._PREFIX)
        found = self._SETTINGS.search(backbone)
        if found is None:
            return backbone, {}
        backbone = backbone[: found.start()]
        return backbone, _arguments(backbone, found[1], self.takes)

    def one_size(self, plain: str) -> bool:
        from cpc_ext.models.encoders.timm_encoder import has_image_size

        with suppress(ImportError):  # Building the encoder reports that timm is missing.
            return has_image_size(plain)
        return False

    def arguments(self, plain: str, given: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        settings = {self._KEYS[key]: value for key, value in given.items()}
        if seen.patch_size is not None and "img_size" not in settings:
            settings |= {"img_size": seen.patch_size} if self.one_size(plain) else {}
        return {"name": plain, "in_channels": seen.in_channels, **settings}

    def name(self, arguments: Mapping[str, Any]) -> str:
        # In the order that they were given in.
        keys = {ours: theirs for theirs, ours in self._KEYS.items()}
        given = {keys[key]: value for key, value in arguments.items() if key in keys}
        return _with_arguments(self._PREFIX + arguments["name"], given)


_FAMILIES = (_ResNets(), _LayerNormResNets(), _WideResNets(), _MobileNets(), _Timm())

# The allowed names, and patterns of names.
ENCODERS = tuple(name for family in _FAMILIES for name in family.shown)
ENCODER_HELP = " ".join(family.help for family in _FAMILIES)


def check_encoder_name(name: str) -> str:
    """Return the name if it is valid. ValueError if it matches none of ``ENCODERS``, or takes no such arguments.

    A ResNet's name may be followed by arguments of its class, "resnet14:stem=cifar"; the name "resnet" needs at least
    ``blocks``, as in "resnet:blocks=1-1-2,bottleneck=yes,channels=8-16-32". A backbone of timm may be followed by its
    ``img_size``, ``patch_size`` and ``global_pool``, "timm:vit_tiny_patch16_224:patch_size=4", and one of its ResNets
    by the ``stem`` for small images, "timm:resnet18:stem=cifar".
    """
    _parsed(name)
    return name


def has_own_norm(name: str) -> bool:
    """Return whether the encoder of a valid name has a built-in normalisation that cannot be replaced."""
    return _parsed(name)[0].own_norm


def takes_one_size(name: str) -> bool:
    """Return whether the encoder of a valid name takes only inputs of the size that it is built for."""
    family, plain, _ = _parsed(name)
    return family.one_size(plain)


def encoder_spec(name: str, *, norm: str, in_channels: int, stem: str, patch_size: int | None = None) -> EncoderSpec:
    """Return the specification of the encoder of a valid name.

    norm: normalisation, unless the encoder has a built-in one. in_channels: channels of a patch. stem: stem of a
    :class:`ResNetV2Encoder`, unless the name implies one; a MobileNetV2 takes "imagenet" strides for stem "imagenet",
    else "cifar". patch_size: side of a patch in pixels, for encoders that take one size only.
    """
    from cpc_ext import models

    family, plain, given = _parsed(name)
    arguments = family.arguments(plain, given, _Seen(norm, in_channels, stem, patch_size))
    return EncoderSpec(getattr(models, family.kind), arguments)


def encoder_name(kind: str, arguments: Mapping[str, Any]) -> str:
    """Return the name of an encoder of this class with these arguments, without norm and channels.

    KeyError for a class without names.
    """
    return {family.kind: family for family in _FAMILIES}[kind].name(arguments)


def _parsed(name: str) -> tuple[_Family, str, dict[str, Any]]:
    """Return a name's family, the part before a colon, and the arguments after it; raise as check_encoder_name does."""
    for family in _FAMILIES:
        found = family.parsed(name)
        if found is not None:
            return (family, *found)
    plain, _, rest = name.partition(":")
    _arguments(plain, rest, {})
    raise _no_such(name)


def _no_such(name: str) -> ValueError:
    return ValueError(f"--encoder: expected one of {', '.join(ENCODERS)} (such as wrn-28-2), got {name!r}")


def _arguments(plain: str, rest: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Parse the arguments that follow a name. ValueError if it takes no such arguments."""
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


# Default values, which names leave out.
_DEFAULTS = {"bottleneck": False, "stem_channels": 64, "width": 1.0}


def _with_arguments(plain: str, given: Mapping[str, Any]) -> str:
    text = ",".join(f"{key}={_written(value)}" for key, value in given.items() if value != _DEFAULTS.get(key))
    return f"{plain}:{text}" if text else plain


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
