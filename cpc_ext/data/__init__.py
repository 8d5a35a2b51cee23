"""Datasets as uint8 arrays, and the views of them that a model trains on."""

from cpc_ext.data.batch_share import BatchShare
from cpc_ext.data.download import DownloadError
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.drawn.textures import make_textures
from cpc_ext.data.images.fetch import ImageFetcher
from cpc_ext.data.images.patch_augmentation import AUTO_AUGMENT, PatchAugmentation
from cpc_ext.data.images.simclr_view import SimCLRView
from cpc_ext.data.images.views import PatchView
from cpc_ext.data.load import load_dataset
from cpc_ext.data.sampler import EpochSampler
from cpc_ext.data_sets import DATASETS
from cpc_ext.ops import AugmentationPlan

__all__ = [
    "AUTO_AUGMENT",
    "DATASETS",
    "AugmentationPlan",
    "BatchShare",
    "Dataset",
    "DownloadError",
    "EpochSampler",
    "ImageFetcher",
    "ImageSet",
    "PatchAugmentation",
    "PatchView",
    "SimCLRView",
    "load_dataset",
    "make_textures",
]
