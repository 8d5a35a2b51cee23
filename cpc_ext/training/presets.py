"""Defaults that depend on the model and the data set: those of a model's task for the data set.

The command line shows them as defaults in its help, and options given there replace them one by one.
"""

from __future__ import annotations

from cpc_ext.data_sets import DATASETS, origin
from cpc_ext.training.config import Preset, RunConfig, validate_config
from cpc_ext.training.machine import default_device, default_precision
from cpc_ext.training.registry import model_presets

__all__ = ["preset", "preset_entry"]


def preset(model: str, dataset: str, *, device: str | None = None) -> RunConfig:
    """The config of a run without further options.

    device: the one it is going to run on, if not the accelerator of this machine; it decides the precision.
    KeyError for a model or a data set that does not exist.
    """
    entry = preset_entry(model, dataset)
    data = {"dataset": dataset, **(entry.get("data", {}) if origin(dataset).sized else {})}
    compute = {"device": default_device(), "precision": default_precision(device or default_device())}
    return validate_config({"model": model, **entry, "data": data, "compute": compute})


def preset_entry(model: str, dataset: str) -> Preset:
    """What differs from the model's defaults, by section. KeyError as of :func:`preset`.

    A data set that the model has no presets for is served by those of the nearest kind: drawn images are as small and
    plain as the textures, and what serves the user's own images serves all others.
    """
    if dataset not in DATASETS:
        raise KeyError(dataset)
    presets = model_presets(model)
    kind = "textures" if origin(dataset).folder == "drawn" else "folder"
    return presets.get(dataset, presets[kind])
