"""Datasets as uint8 arrays, and the views of them that a model trains on."""

from .dataset import Dataset, ImageSet
from .load import DATASETS, load_dataset
from .textures import make_textures

__all__ = ["DATASETS", "Dataset", "ImageSet", "load_dataset", "make_textures"]
