"""Defaults that depend on the model, the data set and the recipe: those of a model's task for the data set.

The command line shows them as defaults in its help, and options given there replace them one by one.
"""

from __future__ import annotations

from cpc_ext.data_sets import DATASETS, drawn_of, folder_of, origin
from cpc_ext.training.config import Preset, RunConfig, validate_config
from cpc_ext.training.machine import default_device, default_precision
from cpc_ext.training.registry import model_medium, model_presets, model_recipes

__all__ = ["FEW_MINUTES", "default_dataset", "preset", "preset_entry"]


def default_dataset(model: str) -> str:
    """What a model is trained on where nothing else is said: the drawn one of its medium. KeyError as below."""
    return drawn_of(model_medium(model))


# The side in pixels below which the user's images are small, and the minutes below which recordings are few.
_SMALL, FEW_MINUTES = 64, 120.0


def preset(
    model: str,
    dataset: str,
    *,
    recipe: str | None = None,
    device: str | None = None,
    side: int | None = None,
    minutes: float | None = None,
) -> RunConfig:
    """The config of a run without further options.

    recipe: one of the model's, if not its first.
    side: of the images in pixels, where it is known; the defaults of the user's own images depend on it.
    minutes: of all recordings, likewise.
    device: the one it is going to run on, if not the accelerator of this machine; it also decides the precision.
    KeyError for a model, a data set or a recipe that does not exist; the config's own error for data of another medium.
    """
    entry = preset_entry(model, dataset, recipe, side=side, minutes=minutes)
    # Images that have a size of their own keep it, unless they are smaller than what is to be cut out of them.
    kept = origin(dataset).own_size and (side is None or side >= entry.get("view", {}).get("crop", 0))
    data = {"dataset": dataset, **({} if kept else entry.get("data", {}))}
    device = device or default_device()
    compute = {"device": device, "precision": default_precision(device)}
    return validate_config({"model": model, **entry, "data": data, "compute": compute})


def preset_entry(
    model: str,
    dataset: str,
    recipe: str | None = None,
    *,
    side: int | None = None,
    minutes: float | None = None,
) -> Preset:
    """What differs from the model's defaults, by section. KeyError as of :func:`preset`.

    A data set that the model has no presets for is served by those of the nearest kind: drawn images are as small and
    plain as the textures, and what serves the user's own images serves all others. For these a model may have others
    where they are small, called folder-small, and for the user's recordings where they are few, called
    audio-folder-small. What a preset says of an option goes before what the recipe says.
    """
    if dataset not in DATASETS:
        raise KeyError(dataset)
    presets, recipes, of = model_presets(model), model_recipes(model), model_medium(model)
    kind = drawn_of(of) if origin(dataset).folder == "drawn" else folder_of(of)
    small = (side is not None and side < _SMALL) or (minutes is not None and minutes < FEW_MINUTES)
    of_kind = presets.get(f"{kind}-small", presets[kind]) if small else presets[kind]
    entry = of_kind if dataset == kind else presets.get(dataset, of_kind)
    if not recipes and recipe is not None:
        raise KeyError(recipe)
    base = recipes[next(iter(recipes)) if recipe is None else recipe] if recipes else {}
    return {section: {**base.get(section, {}), **entry.get(section, {})} for section in dict.fromkeys((*base, *entry))}
