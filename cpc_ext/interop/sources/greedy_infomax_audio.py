"""Conversion of audio checkpoints of Greedy InfoMax (https://github.com/loeweX/Greedy_InfoMax), both ways.

Layouts of a form: "parallel", the state dict of the model inside DataParallel, as the program saves it; "plain",
without DataParallel's prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Form, Program, Reference, Settings, put_weights
from cpc_ext.models import CPC, GreedyInfoMax, RecurrentContext, WaveformEncoder
from cpc_ext.models.encoders.waveform_encoder import NORMALIZATIONS
from cpc_ext.nn import SequenceInfoNCE

__all__ = ["PROGRAM", "GreedyInfoMaxAudioProgram"]

_NAME = re.compile(
    r"fullmodel\.(?P<module>\d+)\.(?:encoder\.model\.layer (?P<layer>\d+)\.0\.(?P<conv>weight|bias)"
    r"|autoregressor\.gru\.(?P<gru>(?:weight|bias)_[ih]h)(?P<sequence>_l0)?|(?P<loss>loss\.predictor\.weight))"
)
_SAMPLINGS = {0: "offsets", 1: "permuted", 2: "same-sequence"}
_SUBSAMPLE = 128
# The program logs its options at the beginning of a run.
_LOG, _OPTION = "log.txt", re.compile(r"(negative_samples|sampling_method|subsample)=(\w+)")


class _Found(NamedTuple):
    """The tensors of a module: its convolutions and its GRU, by the names in our layers, and its predictor."""

    layers: list[dict[str, Tensor]]
    gru: dict[str, Tensor]
    predictor: Tensor


class GreedyInfoMaxAudioProgram(Program):
    """See the module."""

    source = "greedy-infomax-audio"
    settings = frozenset(("neg_samples", "normalization"))

    def knows(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None

    def noted_in_name(self, checkpoint: Checkpoint) -> dict[str, Any]:
        noted: dict[str, Any] = {"negative_samples": 10}
        for file in checkpoint.files[:1]:
            noted |= _logged(file.parent / _LOG)
        return noted

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        state = checkpoint.merged()
        unknown = [name for name in state if not self.knows(name)]
        if unknown or not state:
            raise self.refuse(checkpoint, unknown)
        modules = self._modules(checkpoint, state)
        widths = [len(layer["weight"]) for module in modules for layer in module.layers]
        if len(widths) != 5:
            raise CheckpointError(f"{checkpoint.origin} has {len(widths)} convolutions, expected 5 in all modules")
        steps = {len(module.predictor) / width for module, width in zip(modules, _widths(modules), strict=True)}
        pred_steps = int(min(steps))
        if steps != {pred_steps} or not pred_steps:
            raise CheckpointError(
                f"{checkpoint.origin}: predictors must have as many rows as encodings have channels, times the steps, "
                f"which are {sorted(steps)}"
            )
        noted = checkpoint.options
        cell = any(name.startswith("fullmodel.") and name.endswith("gru.weight_ih") for name in state)
        configuration: dict[str, Any] = {
            "kind": self.source,
            "channels": widths,
            "modules": [len(module.layers) for module in modules],
            "hidden": [len(module.gru["weight_hh_l0"][0]) if module.gru else None for module in modules],
            "remove_bptt": cell,
            "normalization": settings.normalization or "greedy-infomax",
            "objective": {
                "pred_steps": pred_steps,
                "sampling": _SAMPLINGS.get(noted.get("sampling_method", 1), "permuted"),
                "neg_samples": settings.neg_samples,
                "subsample": _SUBSAMPLE if noted.get("subsample") == "True" else None,
            },
        }
        model = _built(configuration)
        put_weights(model, _weights(modules, pred_steps), lambda name: None, checkpoint.origin)
        assumed = () if settings.normalization else ("normalization greedy-infomax",)
        layout = "parallel" if checkpoint.wrapped else "plain"
        return Reference(self.source, model, configuration, assumed, Form(layout))

    def _modules(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> list[_Found]:
        found: dict[int, _Found] = {}
        layers: dict[int, dict[int, dict[str, Tensor]]] = {}
        gru: dict[int, dict[str, Tensor]] = {}
        predictors: dict[int, Tensor] = {}
        for name, value in state.items():
            match = _NAME.fullmatch(name)
            assert match is not None
            module = int(match["module"])
            if match["layer"]:
                layers.setdefault(module, {}).setdefault(int(match["layer"]), {})[match["conv"]] = value
            elif match["gru"]:
                gru.setdefault(module, {})[f"{match['gru']}_l0"] = value
            else:
                predictors[module] = value
        count = max(predictors, default=-1) + 1
        for module in range(count):
            own, parts, predictor = layers.get(module, {}), gru.get(module, {}), predictors.get(module)
            if not _is_whole(own, parts, predictor):
                raise CheckpointError(f"{checkpoint.origin}: module {module} of {count} is not complete")
            assert predictor is not None
            found[module] = _Found([own[layer] for layer in range(len(own))], parts, predictor)
        if layers.keys() | gru.keys() != found.keys() or not found or not found[0].layers:
            raise CheckpointError(f"{checkpoint.origin}: modules without a loss, expected one of each")
        return list(found.values())

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        encoder = getattr(model, "encoder", None)
        if not isinstance(model, CPC | GreedyInfoMax) or not isinstance(encoder, WaveformEncoder):
            raise CheckpointError(f"{self.source} has no model like a {type(model).__name__}")
        if encoder.norm != "none" or encoder.padding != (2, 2, 2, 2, 1):
            raise CheckpointError(f"{self.source} has encoders without norm, with paddings of their own")
        if encoder.normalization not in NORMALIZATIONS.values():
            raise CheckpointError(f"{self.source} normalises samples by constants of its own")
        state: dict[str, Tensor] = {}
        sizes = [5] if isinstance(model, CPC) else [len(module.blocks) for module in model.encoder_modules]
        layer = 0
        for module, size in enumerate(sizes):
            prefix = f"fullmodel.{module}."
            for index, block in enumerate(list(encoder.layers)[layer : layer + size]):
                for name, value in block.state_dict().items():
                    state[f"{prefix}encoder.model.layer {index}.0.{name.removeprefix('conv.')}"] = value
            layer += size
            context = model.context if isinstance(model, CPC) else model.context_of(module)
            if context is not None:
                state |= {f"{prefix}autoregressor.gru.{name}": one for name, one in self._gru(context).items()}
            objective = model.objective if isinstance(model, CPC) else model.objectives[module]
            if not isinstance(objective, SequenceInfoNCE) or objective.weight is None:
                raise CheckpointError(f"{self.source} predicts sequences by matrices")
            if objective.reverse:
                raise CheckpointError(f"{self.source} predicts forwards in time")
            # The program's scores are sums over channels. If ours are means, divide the matrices by the channels.
            channels = objective.encoding_channels if objective.score == "mean" else 1
            state[f"{prefix}loss.predictor.weight"] = objective.weight.flatten(0, 1) / channels
        prefix = "" if form is not None and form.layout == "plain" else "module."
        return {prefix + name: value for name, value in state.items()}

    def _gru(self, context: nn.Module) -> dict[str, Tensor]:
        if not isinstance(context, RecurrentContext) or context.kind != "gru" or len(context.layers) > 1:
            raise CheckpointError(f"{self.source} has a GRU of one layer as context network")
        if context.reverse or context.keep_state:
            raise CheckpointError(f"{self.source} has GRUs that run forwards, from zeros")
        state = context.layers[0].state_dict()
        return {name.removesuffix("_l0"): value for name, value in state.items()} if context.remove_bptt else state


PROGRAM = GreedyInfoMaxAudioProgram()


def _logged(path: Path) -> dict[str, Any]:
    """Return the options in the first line of the run's log; empty if there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            line = file.readline(10_000)
    except OSError:
        return {}
    return {name: int(value) if value.isdecimal() else value for name, value in _OPTION.findall(line)}


def _is_whole(layers: Mapping[int, Mapping[str, Tensor]], gru: Mapping[str, Tensor], predictor: Tensor | None) -> bool:
    """Return whether a module has consecutive layers, a GRU, or both, and a predictor, of the right dimensions."""
    weights = [layers.get(layer, {}).get("weight") for layer in range(len(layers))]
    if any(weight is None or weight.ndim != 3 or 0 in weight.shape for weight in weights):
        return False
    if predictor is None or predictor.ndim != 2:
        return False
    hidden = gru.get("weight_hh_l0")
    return (hidden is not None and hidden.ndim == 2 and 0 not in hidden.shape) if gru else bool(layers)


def _widths(modules: list[_Found]) -> list[int]:
    """Return the channels of each module's encodings; one without convolutions has those of the module before."""
    widths: list[int] = []
    for module in modules:
        widths.append(len(module.layers[-1]["weight"]) if module.layers else widths[-1])
    return widths


def _weights(modules: list[_Found], pred_steps: int) -> dict[str, Tensor]:
    """Return all weights by our names."""
    layers = [layer for module in modules for layer in module.layers]
    weights = {
        f"encoder.layers.{index}.conv.{name}": value
        for index, layer in enumerate(layers)
        for name, value in layer.items()
    }
    several = sum(bool(module.gru) for module in modules) > 1
    for index, module in enumerate(modules):
        context = f"context.{index}." if several else "context."
        weights |= {f"{context}layers.0.{name}": value for name, value in module.gru.items()}
        objective = "objective.weight" if len(modules) == 1 else f"objectives.{index}.weight"
        weights[objective] = module.predictor.unflatten(0, (pred_steps, -1))
    return weights


def _built(configuration: Mapping[str, Any]) -> CPC | GreedyInfoMax:
    """Build the model of a configuration, without loading its weights."""
    channels, modules, hidden = (configuration[name] for name in ("channels", "modules", "hidden"))
    encoder = WaveformEncoder(channels, normalization=configuration["normalization"])
    ends = [sum(modules[: index + 1]) for index in range(len(modules))]
    contexts = [
        RecurrentContext(channels[end - 1], size, remove_bptt=configuration["remove_bptt"])
        for end, size in zip(ends, hidden, strict=True)
        if size is not None
    ]
    if len(modules) == 1:
        if not contexts:
            raise CheckpointError("a model of one module needs a GRU")
        objective = SequenceInfoNCE(channels[-1], hidden[-1], **configuration["objective"])
        return CPC(encoder, contexts[0], objective)
    if len(contexts) not in (1, len(modules)) or hidden[-1] is None:
        raise CheckpointError("a GRU belongs to the last module, or one to each")
    starts = [start for start in ends[:-1] if start < len(channels)]
    return GreedyInfoMax(
        encoder,
        starts or 1,
        context=contexts[0] if len(contexts) == 1 else contexts,
        context_module=modules[-1] == 0,
        objective=SequenceInfoNCE,
        **configuration["objective"],
    )
