"""Datasets as uint8 arrays, and the views of them that a model trains on."""

from cpc_ext.data.dataset import Dataset, ImageSet
from cpc_ext.data.download import DownloadError
from cpc_ext.data.fetch import ImageFetcher
from cpc_ext.data.load import DATASETS, load_dataset
from cpc_ext.data.sampler import EpochSampler
from cpc_ext.data.textures import make_textures
from cpc_ext.data.views import PatchView

__all__ = [
    "DATASETS",
    "Dataset",
    "DownloadError",
    "EpochSampler",
    "ImageFetcher",
    "ImageSet",
    "PatchView",
    "load_dataset",
    "make_textures",
]
