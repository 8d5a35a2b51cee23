"""Figures of runs and evaluations, as PNG."""

from cpc_ext.figures.curves import ProbeCurve, curves, curves_by_module, likelihood_curves
from cpc_ext.figures.drawing import (
    AccuracyLine,
    augmentation_sheet,
    confusion,
    label_efficiency,
    model_inputs,
    nearest_patches,
    save,
    save_images,
)
from cpc_ext.figures.modules import accuracy_by_depth
from cpc_ext.figures.speech import DepthPanel, speech_by_depth, spoken_frames

__all__ = [
    "AccuracyLine",
    "DepthPanel",
    "ProbeCurve",
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
