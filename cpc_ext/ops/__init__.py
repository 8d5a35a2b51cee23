"""The ops: one file each, with the schema, fake kernel, autograd and the reference in plain PyTorch."""

from cpc_ext.ops._patch_transforms import Transform
from cpc_ext.ops.augment_patches import AugmentationPlan, augment_patches
from cpc_ext.ops.conv2d import conv2d
from cpc_ext.ops.extract_patches import extract_patches
from cpc_ext.ops.info_nce import InfoNCEOutput, info_nce
from cpc_ext.ops.logistic_mixture import logistic_mixture_nll, sample_logistic_mixture
from cpc_ext.ops.masked_conv2d import masked_conv2d
from cpc_ext.ops.pixel_steps import PixelMap, PixelMaps, PixelPlace, PixelSource, PixelStep, PixelSteps, pixel_steps
from cpc_ext.ops.predict_and_contrast import PredictAndContrastOutput, predict_and_contrast
from cpc_ext.ops.scores_logsumexp import scores_logsumexp
from cpc_ext.ops.sigmoid_contrast import sigmoid_contrast
from cpc_ext.ops.waveform_conv1d import waveform_conv1d

__all__ = [
    "AugmentationPlan",
    "InfoNCEOutput",
    "PixelMap",
    "PixelMaps",
    "PixelPlace",
    "PixelSource",
    "PixelStep",
    "PixelSteps",
    "PredictAndContrastOutput",
    "Transform",
    "augment_patches",
    "conv2d",
    "extract_patches",
    "info_nce",
    "logistic_mixture_nll",
    "masked_conv2d",
    "pixel_steps",
    "predict_and_contrast",
    "sample_logistic_mixture",
    "scores_logsumexp",
    "sigmoid_contrast",
    "waveform_conv1d",
]
