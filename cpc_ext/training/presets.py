"""Defaults of the options by model, data set and recipe.

The command line shows them as defaults in its help, and options given there replace them one by one.
"""

from __future__ import annotations

from cpc_ext.data_sets import DATASETS, drawn_of, folder_of, origin
from cpc_ext.training.config import Preset, RunConfig, validate_config
from cpc_ext.training.machine import default_device, default_precision
from cpc_ext.training.registry import model_medium, model_presets, model_recipes

__all__ = ["FEW_MINUTES", "default_dataset", "preset", "preset_entry"]


def default_dataset(model: str) -> str:
    """Return the data set that a model trains on by default: the generated one of its medium.

    Raises KeyError if there is no such model.
    """
    return drawn_of(model_medium(model))


# Images with a side below this, in pixels, count as small; recordings with fewer minutes in all count as few.
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
    """Return the config of a run without further options.

    Args:
        model: name of the model.
        dataset: name of the data set.
        recipe: one of the model's recipes; None for its first.
        device: the device to run on, which also decides the precision; None for this machine's accelerator, or the CPU.
        side: side of the images in pixels, if known; the defaults for the user's own images depend on it.
        minutes: total length of the recordings, if known; the defaults for the user's own recordings depend on it.

    Raises:
        KeyError: there is no such model, data set or recipe.
        ValidationError: the data set's medium is not the model's.
    """
    entry = preset_entry(model, dataset, recipe, side=side, minutes=minutes)
    # Data sets with a size of their own keep it, unless their images are smaller than the crop.
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
    """Return the values that differ from the model's defaults, by section. Raises KeyError as :func:`preset` does.

    A data set without a preset of its own uses that of the nearest kind: of the medium's generated data set if it is
    generated too, else of the user's own files. A model may have a preset for the user's images if they are
    small (folder-small), and for the user's recordings if they are few (audio-folder-small). Where both the preset and
    the recipe set an option, the preset takes precedence.
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
