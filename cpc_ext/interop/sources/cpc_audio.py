"""Conversion of checkpoints of CPC_audio (https://github.com/facebookresearch/CPC_audio), both ways.

Layouts of a form: "checkpoint", the state dicts of the model and the criterion, with the prefixes "gEncoder." and
"cpcCriterion.", under which a file holds them side by side; "weights", the state dict of the model alone, as in the
file that torch.hub downloads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.names import NameMap, under, with_prefix
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Encodings, Form, Program, Reference, Settings, put_weights
from cpc_ext.models import CPC, CausalTransformerContext, RecurrentContext, WaveformEncoder
from cpc_ext.models.contexts.causal_transformer_context import absolute_positions
from cpc_ext.nn import CausalTransformerLayer, SequenceInfoNCE

__all__ = ["PROGRAM", "CPCAudioProgram"]

_MODEL, _CRITERION = "gEncoder.", "cpcCriterion."
_OPTIONS_FILE = "checkpoint_args.json"
_PREDICTORS = "wPrediction.predictors."
_HEADS = 8
_KINDS = {3: "gru", 4: "lstm", 1: "rnn"}
_NORMS = {"channel": "layerNorm", "batch": "batchNorm", "instance": "instanceNorm", "none": "ID"}
_ENCODER = NameMap(
    [
        ("gEncoder.conv{layer}.{parameter}", "layers.{layer}.conv.{parameter}"),
        ("gEncoder.batchNorm{layer}.{parameter}", "layers.{layer}.norm.{parameter}"),
    ]
)
# Weights of a transformer layer. Its other tensors are constants.
_TRANSFORMER = NameMap(
    [
        ("multihead.Wq.weight", "query.weight"),
        ("multihead.Wk.weight", "key.weight"),
        ("multihead.Wv.weight", "value.weight"),
        ("multihead.Wo.weight", "output.weight"),
        ("multihead.Att.Krelpos", "relative"),
        ("ln_multihead.{parameter}", "attention_norm.{parameter}"),
        ("ffnetwork.lin1.{parameter}", "expand.{parameter}"),
        ("ffnetwork.lin2.{parameter}", "contract.{parameter}"),
        ("ln_ffnetwork.{parameter}", "norm.{parameter}"),
    ]
)
_CONSTANTS = ("multihead.Att.z", "multihead.Att.mask")
_FEED_FORWARD = NameMap([("lin1.{parameter}", "expand.{parameter}"), ("lin2.{parameter}", "contract.{parameter}")])


class CPCAudioProgram(Program):
    """See the module."""

    source = "cpc-audio"
    settings = frozenset(("neg_samples",))

    def knows(self, name: str) -> bool:
        return name.startswith((_MODEL, "gAR.", _CRITERION + _PREDICTORS))

    def noted_in_name(self, checkpoint: Checkpoint) -> dict[str, Any]:
        noted: dict[str, Any] = {"negativeSamplingExt": 128}
        for file in checkpoint.files[:1]:
            try:
                options = json.loads((file.parent / _OPTIONS_FILE).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot read {file.parent / _OPTIONS_FILE}: {error}") from None
            noted |= options if isinstance(options, dict) else {}
        return noted

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        state = checkpoint.merged()
        whole = any(name.startswith((_MODEL + _MODEL, _MODEL + "gAR.", _CRITERION)) for name in state)
        network = under(state, _MODEL) if whole else state
        criterion = under(state, _CRITERION)
        unknown = [name for name in state if not self.knows(name) or (whole and name.startswith("gAR."))]
        unknown += [name for name in network if not name.startswith(("gEncoder.", "gAR."))]
        if unknown or not network:
            raise self.refuse(checkpoint, unknown)
        noted = checkpoint.options
        reverse = noted.get("cpc_mode") == "reverse"
        encoder, weights = _encoder(checkpoint, network)
        context, context_weights, unused = _context(checkpoint, network, encoder.out_channels, noted, reverse)
        weights |= with_prefix("context.", context_weights)
        objective, predictions, constants = _objective(
            checkpoint, criterion, (encoder.out_channels, context.out_channels), settings, noted, reverse
        )
        weights |= with_prefix("objective.", predictions)
        model = CPC(encoder, context, objective)
        put_weights(model, weights, lambda name: None, checkpoint.origin)
        configuration = {
            "kind": self.source,
            "channels": encoder.out_channels,
            "norm": encoder.norm,
            "context": _described_context(context),
            "objective": {
                name: getattr(objective, name) for name in ("pred_steps", "predictor", "neg_samples", "reverse")
            },
            "predictions": bool(criterion),
        }
        assumed: tuple[str, ...] = () if "cpc_mode" in noted else ("time runs forwards, from zeros",)
        assumed += () if criterion else ("predictions, which start anew",)
        names = with_prefix(_MODEL, unused) if whole else unused
        form = Form("checkpoint" if whole else "weights", names | with_prefix(_CRITERION, constants))
        return Reference(self.source, model, configuration, assumed, form)

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        if not isinstance(model, CPC) or not isinstance(model.encoder, WaveformEncoder):
            raise CheckpointError(f"{self.source} has no model like a {type(model).__name__}")
        encoder, context, objective = model.encoder, model.context, model.objective
        if encoder.padding != (3, 2, 1, 1, 1):
            raise CheckpointError(
                f"{self.source} has encoders with paddings 3, 2, 1, 1, 1 (--padding cpc-audio), not {encoder.padding}"
            )
        if len({layer.out_channels for layer in encoder.layers}) > 1:
            raise CheckpointError(f"{self.source} has encoders whose layers have one width")
        if encoder.normalization != (1, 0):
            raise CheckpointError(f"{self.source} does not normalise samples")
        state: dict[str, Tensor] = {}
        for name, value in encoder.state_dict().items():
            channel = encoder.norm == "channel" and ".norm." in name
            state[str(_ENCODER.theirs(name))] = value[None, :, None] if channel else value
        state |= with_prefix("gAR.", _context_from_ours(context, complete=form is None))
        if form is not None and form.layout == "weights":
            return state | form.unused
        if not isinstance(objective, SequenceInfoNCE):
            raise CheckpointError(f"{self.source} predicts sequences")
        if getattr(context, "reverse", objective.reverse) != objective.reverse:
            raise CheckpointError(f"{self.source} has one direction of time for contexts and predictions")
        predictions = _predictions_from_ours(objective, complete=form is None)
        state = with_prefix(_MODEL, state) | with_prefix(_CRITERION + _PREDICTORS, predictions)
        return state | ({} if form is None else form.unused)

    def packed(self, model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, str]]:
        assert isinstance(model, CPC)
        options = {_OPTIONS_FILE: json.dumps(_options(model), indent=2)}
        if not any(name.startswith(_CRITERION) for name in state):
            return {"config": _options(model), "weights": dict(state)}, {}
        parts = {part.removesuffix("."): under(state, part) for part in (_MODEL, _CRITERION)}
        return {**parts, "optimizer": None, "best": parts["gEncoder"]}, options


PROGRAM = CPCAudioProgram()


def _encoder(checkpoint: Checkpoint, network: Mapping[str, Tensor]) -> tuple[WaveformEncoder, dict[str, Tensor]]:
    """Return the encoder, and its weights by our names in the whole model."""
    state = {name: value for name, value in network.items() if name.startswith("gEncoder.")}
    first, scale = state.get("gEncoder.conv0.weight"), state.get("gEncoder.batchNorm0.weight")
    unknown = [name for name in state if not _ENCODER.ours(name)]
    if first is None or first.ndim != 3 or unknown:
        raise CheckpointError(
            f"{checkpoint.origin} is not an encoder of {PROGRAM.source}, which begins with gEncoder.conv0.weight of "
            f"three dimensions{', and has no ' + unknown[0] if unknown else ''}"
        )
    norm = "none" if scale is None else "channel" if scale.ndim == 3 else "instance"
    if "gEncoder.batchNorm0.running_mean" in state:
        norm = "batch"
    weights = {}
    for name, value in state.items():
        of_channels = "batchNorm" in name and value.ndim == 3  # [1, C, 1]
        weights[f"encoder.{_ENCODER.ours(name)}"] = value.squeeze(2).squeeze(0) if of_channels else value
    try:
        return WaveformEncoder(len(first), norm=norm, padding="cpc-audio"), weights
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.origin}: {error}") from None


def _context(
    checkpoint: Checkpoint, network: Mapping[str, Tensor], channels: int, noted: Mapping[str, Any], reverse: bool
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Return the context network, its weights by our names, and its constants by theirs."""
    state = under(network, "gAR.")
    if not state:
        return Encodings(channels), {}, {}
    if any(name.startswith("baseNet.") for name in state):
        return *_recurrent(checkpoint, state, channels, noted, reverse), {}
    layers = {int(found[1]): under(state, f"{found[1]}.") for name in state if (found := re.match(r"(\d+)\.", name))}
    table = layers.get(0, {}).get("pe")
    first = 0 if table is None else 1
    if (
        sorted(layers) != list(range(len(layers)))
        or len(layers) == first
        or sum(map(len, layers.values())) != len(state)
    ):
        raise PROGRAM.refuse(checkpoint, [f"gAR.{name}" for name in state])
    unused: dict[str, Tensor] = {}
    if table is not None:
        expected = absolute_positions(*table.shape[1:])[None] if table.ndim == 3 else torch.empty(0)
        if (
            len(layers.pop(0)) > 1
            or table.shape != expected.shape
            or not torch.allclose(table.double(), expected.double(), rtol=0, atol=1e-4)
        ):
            raise CheckpointError(f"{checkpoint.origin}: gAR.0.pe are not the sines and cosines of positions")
        unused["gAR.0.pe"] = table
    weights: dict[str, Tensor] = {}
    window = 1 if table is None else table.shape[1]
    for index, layer in layers.items():
        own, constants = _transformer_to_ours(checkpoint, layer, f"gAR.{index}.")
        weights |= with_prefix(f"layers.{index - first}.", own)
        unused |= with_prefix(f"gAR.{index}.", constants)
        window = len(own["relative"]) if "relative" in own else window
    if (table is None) != ("layers.0.relative" in weights):
        raise CheckpointError(f"{checkpoint.origin}: gAR must have either pe or Krelpos")
    if channels % _HEADS:
        raise CheckpointError(
            f"{checkpoint.origin}: {channels} channels are no multiple of a transformer's {_HEADS} heads"
        )
    context = CausalTransformerContext(
        channels, window, layers=len(layers), absolute=table is not None, reverse=reverse, hidden=_hidden(weights)
    )
    return context, weights, unused


def _recurrent(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], channels: int, noted: Mapping[str, Any], reverse: bool
) -> tuple[RecurrentContext, dict[str, Tensor]]:
    found = {name: re.fullmatch(r"baseNet\.(\w+_)l(\d+)", name) for name in state}
    hidden = state.get("baseNet.weight_hh_l0")
    gates = 0.0 if hidden is None or hidden.ndim != 2 else len(hidden) / hidden.shape[1]
    if None in found.values() or gates not in _KINDS:
        raise PROGRAM.refuse(checkpoint, [f"gAR.{name}" for name, match in found.items() if match is None] or ["gAR"])
    assert hidden is not None
    weights = {f"layers.{match[2]}.{match[1]}l0": state[name] for name, match in found.items() if match}
    context = RecurrentContext(
        channels,
        hidden.shape[1],
        kind=_KINDS[int(gates)],
        layers=1 + max(int(match[2]) for match in found.values() if match),
        # The state carries over between windows only if the windows are sequential.
        keep_state=noted.get("samplingType") == "sequential",
        reverse=reverse,
    )
    return context, weights


def _transformer_to_ours(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of a transformer layer by our names, and its constants by theirs."""
    unknown = [prefix + name for name in state if name not in _CONSTANTS and not _TRANSFORMER.ours(name)]
    if unknown:
        raise PROGRAM.refuse(checkpoint, unknown)
    mask, zeros = (state.get(f"multihead.Att.{name}") for name in ("mask", "z"))
    if zeros is not None and (zeros.ndim != 3 or bool(zeros.any())):
        raise CheckpointError(f"{checkpoint.origin}: {prefix}multihead.Att.z must be zeros of three dimensions")
    if mask is not None and not (mask.ndim == 3 and torch.equal(mask, _mask(mask.shape[2]).to(mask))):
        raise CheckpointError(
            f"{checkpoint.origin}: {prefix}multihead.Att.mask hides other positions than those to come"
        )
    weights = {str(_TRANSFORMER.ours(name)): value for name, value in state.items() if name not in _CONSTANTS}
    if "relative" in weights:
        if weights["relative"].ndim != 2:
            raise CheckpointError(f"{checkpoint.origin}: {prefix}multihead.Att.Krelpos must have two dimensions")
        # The program has a column for each distance, the largest first; we have a row for each, the smallest first.
        weights["relative"] = weights["relative"].t().flip(0)
    return weights, {name: value for name, value in state.items() if name in _CONSTANTS}


def _transformer_from_ours(layer: CausalTransformerLayer, size: int) -> dict[str, Tensor]:
    """Return the weights of a transformer layer by their names, with its constants for this window size unless 0."""
    if layer.heads != _HEADS:
        raise CheckpointError(f"{PROGRAM.source} has transformers of {_HEADS} heads, this one has {layer.heads}")
    state = layer.state_dict()
    theirs = {str(_TRANSFORMER.theirs(name)): value for name, value in state.items()}
    relative = state.get("relative")
    if relative is not None:
        theirs["multihead.Att.Krelpos"] = relative.flip(0).t().contiguous()
        if size:
            theirs["multihead.Att.z"] = relative.new_zeros(1, size, 1)
    if size:
        theirs["multihead.Att.mask"] = _mask(size).to(state["norm.weight"])
    return theirs


def _mask(size: int) -> Tensor:
    """Return the mask that is added to scores, [1, size, size]: minus infinity for later positions."""
    return torch.full((1, size, size), -torch.inf).triu(1)


def _hidden(weights: Mapping[str, Tensor], layer: str = "layers.0.") -> int:
    """Return the hidden channels of a transformer layer's feed-forward network."""
    bias = weights.get(f"{layer}expand.bias")
    return 1 if bias is None else max(bias.numel(), 1)


def _context_from_ours(context: nn.Module, *, complete: bool) -> dict[str, Tensor]:
    if isinstance(context, Encodings):
        return {}
    if isinstance(context, RecurrentContext) and not context.remove_bptt:
        return {
            f"baseNet.{name.removesuffix('l0')}l{layer}": value
            for layer, network in enumerate(context.layers)
            for name, value in network.state_dict().items()
        }
    if not isinstance(context, CausalTransformerContext):
        raise CheckpointError(f"{PROGRAM.source} has no context network like this {type(context).__name__}")
    state: dict[str, Tensor] = {}
    size = context.window if complete else 0
    if context.absolute and complete:
        table = absolute_positions(size, context.out_channels)
        state["0.pe"] = table[None].to(context.layers[0].norm.weight)
    for index, layer in enumerate(context.layers, start=int(context.absolute)):
        state |= with_prefix(f"{index}.", _transformer_from_ours(layer, size))
    return state


def _described_context(context: nn.Module) -> dict[str, Any]:
    """Return the class and arguments of a context network, as JSON values."""
    described: dict[str, Any] = {"class": type(context).__name__}
    if isinstance(context, RecurrentContext):
        names: tuple[str, ...] = ("kind", "keep_state", "reverse")
        described |= {"hidden": context.out_channels, "layers": len(context.layers)}
    elif isinstance(context, CausalTransformerContext):
        names = ("absolute", "reverse")
        described |= {"window": context.window, "layers": len(context.layers)}
    else:
        names = ()
    return described | {name: getattr(context, name) for name in names}


def _objective(
    checkpoint: Checkpoint,
    criterion: Mapping[str, Tensor],
    channels: tuple[int, int],
    settings: Settings,
    noted: Mapping[str, Any],
    reverse: bool,
) -> tuple[SequenceInfoNCE, dict[str, Tensor], dict[str, Tensor]]:
    """Return the criterion, its weights by our names, and its constants by theirs."""
    options: dict[str, Any] = {
        "sampling": "shifted",
        "neg_samples": settings.neg_samples,
        "common_positions": True,
        "reduction": "sum",
        "score": "mean",
        "start": "cpc-audio",
        "dropout": 0.5 if noted.get("dropout") in (True, "True") else 0.0,
        "reverse": reverse,
    }
    if not criterion:
        steps = noted.get("nPredicts", 12)
        fresh = SequenceInfoNCE(*channels, pred_steps=steps if isinstance(steps, int) else 12, **options)
        return fresh, fresh.state_dict(), {}
    predictors = under(criterion, _PREDICTORS)
    steps = {
        int(found[1]): under(predictors, f"{found[1]}.") for name in predictors if (found := re.match(r"(\d+)\.", name))
    }
    if sorted(steps) != list(range(len(steps))) or len(predictors) != len(criterion):
        raise PROGRAM.refuse(checkpoint, [_CRITERION + name for name in criterion])
    kind = _predictor_kind(checkpoint, steps[0])
    if kind == "linear":
        if len({value["weight"].shape for value in steps.values() if value.keys() == {"weight"}}) != 1 or any(
            value.keys() != {"weight"} for value in steps.values()
        ):
            raise CheckpointError(f"{checkpoint.origin}: predictors must be matrices of one shape")
        matrices = torch.stack([steps[step]["weight"] for step in range(len(steps))])
        return SequenceInfoNCE(*channels, pred_steps=len(steps), **options), {"weight": matrices}, {}
    weights: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    window = 128
    for step, state in steps.items():
        own = dict(state)
        if kind == "transformer":
            own, kept = _transformer_to_ours(checkpoint, under(state, "0."), f"{_CRITERION}{_PREDICTORS}{step}.0.")
            constants |= with_prefix(f"{_PREDICTORS}{step}.0.", kept)
            window = len(steps) + len(own.get("relative", ()))
        elif kind == "ffd":
            own = {_FEED_FORWARD.ours(name) or name: value for name, value in state.items()}
        elif kind == "lstm":
            own = with_prefix("lstm.", state)
        weights |= with_prefix(f"predictors.{step}.", own)
    window = max(window, len(steps) + 1)
    objective = SequenceInfoNCE(*channels, pred_steps=len(steps), predictor=kind, window=window, **options)
    return objective, weights, constants


def _predictor_kind(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> str:
    """Return the kind of predictor that has these tensors."""
    weight = state.get("weight")
    if weight is not None and weight.ndim == 3 and weight.shape[2] in (4, 8, 12):
        return f"conv{weight.shape[2]}"
    if weight is not None and weight.ndim == 2:
        return "linear"
    if "lin1.weight" in state:
        return "ffd"
    if any(name.startswith("0.multihead.") for name in state):
        return "transformer"
    hidden = state.get("weight_hh_l0")
    if hidden is not None and hidden.ndim == 2 and len(hidden) == 4 * hidden.shape[1]:
        return "lstm"
    # The program's RNN predictors are not supported, because they run over the batch.
    raise PROGRAM.refuse(checkpoint, [f"{_CRITERION}{_PREDICTORS}0.{name}" for name in state])


def _predictions_from_ours(objective: SequenceInfoNCE, *, complete: bool) -> dict[str, Tensor]:
    if (objective.sampling, objective.common_positions, objective.exclude_positive) != ("shifted", True, False):
        raise CheckpointError(f"{PROGRAM.source} contrasts shifted frames, at the same positions in all steps")
    # The program's scores are means over channels. If ours are sums, multiply the matrices by the channels.
    factor = objective.encoding_channels if objective.score == "dot" else 1
    if objective.weight is not None:
        return {f"{step}.weight": matrix.detach() * factor for step, matrix in enumerate(objective.weight)}
    if factor != 1:
        raise CheckpointError(
            f'{PROGRAM.source} divides scores by the channels, here {factor}, which only score="mean" does; matrices '
            f'(predictor="linear") make up for it, this predictor, "{objective.predictor}", does not'
        )
    state: dict[str, Tensor] = {}
    for step, predictor in enumerate(objective.predictors):
        own = predictor.state_dict()
        if isinstance(predictor, CausalTransformerLayer):
            size = len(own["relative"]) if complete else 0
            own = with_prefix("0.", _transformer_from_ours(predictor, size))
        elif objective.predictor == "ffd":
            # In the program the weights are in modules inside of equalised layers.
            own = {
                re.sub(r"\.(\w+)$", r".module.\1", str(_FEED_FORWARD.theirs(name))): value
                for name, value in own.items()
            }
        elif objective.predictor == "lstm":
            own = {name.removeprefix("lstm."): value for name, value in own.items()}
        else:
            own = with_prefix("module.module.", own)
        state |= with_prefix(f"{step}.", own)
    return state


def _options(model: CPC) -> dict[str, Any]:
    """Return the program's options for such a model; it uses its defaults for all others."""
    encoder, context, objective = model.encoder, model.context, model.objective
    assert isinstance(encoder, WaveformEncoder)
    assert isinstance(objective, SequenceInfoNCE)
    options: dict[str, Any] = {
        "encoder_type": "cpc",
        "hiddenEncoder": encoder.out_channels,
        "normMode": _NORMS[encoder.norm],
        "nPredicts": objective.pred_steps,
        "negativeSamplingExt": objective.neg_samples,
        "rnnMode": {"lstm": "LSTM"}.get(objective.predictor, objective.predictor),
        "dropout": objective.dropout.p > 0,
        "cpc_mode": "reverse" if objective.reverse else None,
        "hiddenGar": objective.context_channels,
        "samplingType": "samespeaker",
        "arMode": "no_ar",
        "nLevelsGRU": 1,
    }
    if objective.predictor == "transformer":
        options["sizeWindow"] = objective.window * WaveformEncoder.downsampling
    if isinstance(context, RecurrentContext):
        options |= {"arMode": context.kind.upper(), "nLevelsGRU": len(context.layers)}
        options["samplingType"] = "sequential" if context.keep_state else "samespeaker"
    elif isinstance(context, CausalTransformerContext):
        options |= {"arMode": "transformer", "abspos": context.absolute, "nLevelsGRU": len(context.layers)}
        options["sizeWindow"] = context.window * WaveformEncoder.downsampling
    return options
