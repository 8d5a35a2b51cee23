"""Figures of runs and evaluations, as PNG."""

from cpc_ext.figures.drawing import (
    AccuracyLine,
    augmentation_sheet,
    confusion,
    curves,
    label_efficiency,
    likelihood_curves,
    model_inputs,
    nearest_patches,
    save,
    save_images,
)
from cpc_ext.figures.modules import accuracy_by_depth, curves_by_module
from cpc_ext.figures.speech import DepthPanel, speech_by_depth, spoken_frames

__all__ = [
    "AccuracyLine",
    "DepthPanel",
    "accuracy_by_depth",
    "augmentation_sheet",
    "confusion",
    "curves",
    "curves_by_module",
    "label_efficiency",
    "likelihood_curves",
    "model_inputs",
    "nearest_patches",
    "save",
    "save_images",
    "speech_by_depth",
    "spoken_frames",
]
