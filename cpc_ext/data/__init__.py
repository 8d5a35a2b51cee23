"""Data sets as arrays (uint8 images, int16 sound), and the crops and windows of them that models train on."""

from cpc_ext.data.audio.dataset import SAMPLE_RATE, SpeechDataset, WaveformSet, label_count
from cpc_ext.data.audio.fetch import WaveformFetcher
from cpc_ext.data.audio.windows import WindowSampler
from cpc_ext.data.batch_share import BatchShare
from cpc_ext.data.download import DownloadError
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.drawn.textures import make_textures
from cpc_ext.data.images.fetch import ImageFetcher
from cpc_ext.data.images.given import from_dataset
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
    "SAMPLE_RATE",
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
    "SpeechDataset",
    "WaveformFetcher",
    "WaveformSet",
    "WindowSampler",
    "from_dataset",
    "label_count",
    "load_dataset",
    "make_textures",
]
