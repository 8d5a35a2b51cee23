"""Options of a run from a converted model of sound."""

from __future__ import annotations

from typing import Any

from torch import nn

from cpc_ext.models import CPC, CausalTransformerContext, GreedyInfoMax, RecurrentContext, WaveformEncoder
from cpc_ext.models.encoders.waveform_encoder import NORMALIZATIONS, PADDINGS
from cpc_ext.nn.sequence_info_nce import SequenceInfoNCE
from cpc_ext.tasks.cpc_audio.options import RECIPES
from cpc_ext.tasks.speech_options import FRAME, SequencePredictionSection
from cpc_ext.training.errors import TrainingError

__all__ = ["sound_options"]


def sound_options(model: nn.Module) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the --model and the options by section that describe a model of sound.

    Raises TrainingError if no options describe it.
    """
    assert isinstance(model, CPC | GreedyInfoMax)
    encoder = model.encoder
    assert isinstance(encoder, WaveformEncoder)
    widths = {layer.out_channels for layer in encoder.layers}
    if len(widths) > 1:
        raise TrainingError(f"no run has an encoder whose layers have different widths, {sorted(widths)}")
    greedy: dict[str, Any] = {}
    objective: nn.Module
    if isinstance(model, GreedyInfoMax):
        modules = len(model.objectives)
        layers = [len(module.blocks) for module in model.encoder_modules]
        if modules not in (5, 6) or layers[:5] != [1] * 5:
            raise TrainingError(f"no run has {modules} modules of these layers; it has one, or one for each layer")
        several = isinstance(model.context, nn.ModuleList)
        contexts = list(model.context) if isinstance(model.context, nn.ModuleList) else [model.context]
        objective = model.objectives[-1]
        greedy = {"greedy": {"modules": modules, "context_per_module": several}}
    else:
        contexts, objective = [model.context], model.objective
    context = _context(contexts)
    assert isinstance(objective, SequenceInfoNCE)
    if objective.reverse:
        raise TrainingError("no run predicts backwards in time")
    options = {name: getattr(objective, name) for name in _told(objective)} | {"dropout": objective.dropout.p}
    windowed = [part.window for part in (contexts[-1],) if isinstance(part, CausalTransformerContext)]
    windowed += [objective.window] if objective.predictor == "transformer" else []
    if len(set(windowed)) > 1:
        raise TrainingError(f"no run has windows of {windowed[0]} frames for contexts and of {windowed[1]} to predict")
    padding = _name(encoder.padding, PADDINGS)
    recipe = "original" if greedy or padding != "cpc-audio" else "modified"
    if not greedy:
        options["recipe"] = recipe
    # How a program draws its windows determines the negatives.
    windows = {"windows": "sequential"} if context.get("keep_state") else RECIPES[recipe].get("view", {})
    return "greedy-infomax-audio" if greedy else "cpc-audio", {
        "view": {**windows, **({"window": windowed[0] * FRAME} if windowed else {})},
        "encoder": {
            "channels": encoder.out_channels,
            "padding": padding,
            "norm": encoder.norm,
            "normalization": _name(encoder.normalization, NORMALIZATIONS),
        },
        "context": context,
        "prediction": options,
        **greedy,
    }


def _told(objective: SequenceInfoNCE) -> list[str]:
    """Return the prediction options that are attributes of the objective; gather_negatives is up to the run."""
    known = set(SequencePredictionSection.model_fields) - {"dropout", "gather_negatives"}
    return sorted(name for name in known if hasattr(objective, name))


def _name(value: Any, named: dict[str, Any]) -> str:
    return next(name for name, known in named.items() if known == value)


def _context(contexts: list[Any]) -> dict[str, Any]:
    """Return the options of the context networks, which must all be alike."""
    options: list[dict[str, Any]] = []
    for context in contexts:
        if isinstance(context, RecurrentContext) and not context.reverse:
            options.append(
                {
                    "context": context.kind,
                    "context_channels": context.out_channels,
                    "context_layers": len(context.layers),
                    "keep_state": context.keep_state,
                    "backprop_through_time": not context.remove_bptt,
                }
            )
        elif isinstance(context, CausalTransformerContext) and not context.reverse and not context.absolute:
            options.append(
                {
                    "context": "transformer",
                    "context_channels": context.out_channels,
                    "context_layers": len(context.layers),
                }
            )
        else:
            raise TrainingError(
                "no run has a context network like this one: it has recurrent ones and transformers with relative "
                f"positions, which run forwards, not a {type(context).__name__} of another kind"
            )
    if any(each != options[0] for each in options):
        raise TrainingError("no run has context networks of different sizes")
    return options[0]
