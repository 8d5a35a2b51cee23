"""Defaults that depend on the model and the data set: those of a model's task for the data set.

The command line shows them as defaults in its help, and options given there replace them one by one.
"""

from __future__ import annotations

from cpc_ext.data_sets import DATASETS, origin
from cpc_ext.training.config import RunConfig, validate_config
from cpc_ext.training.machine import default_device, default_precision
from cpc_ext.training.registry import model_presets

__all__ = ["preset"]


def preset(model: str, dataset: str, *, device: str | None = None) -> RunConfig:
    """The config of a run without further options.

    device: the one it is going to run on, if not the accelerator of this machine; it decides the precision.
    KeyError for a model or a data set that does not exist.
    """
    presets = model_presets(model)
    if dataset not in DATASETS:
        raise KeyError(dataset)
    # What serves images of any kind, serves a data set that the model has nothing better for.
    entry = presets.get(dataset, presets["folder"])
    data = {"dataset": dataset, **(entry.get("data", {}) if origin(dataset).sized else {})}
    compute = {"device": default_device(), "precision": default_precision(device or default_device())}
    return validate_config({"model": model, **entry, "data": data, "compute": compute})
