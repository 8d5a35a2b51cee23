"""Image sets: refused arguments, statistics, and loading by name."""

import numpy as np
import pytest

from cpc_ext.data import DATASETS, ImageSet, load_dataset
from cpc_ext.data.images.statistics import pixel_statistics


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"images": np.zeros((2, 3, 4), np.uint8)}, "images"),
        ({"images": np.zeros((2, 3, 4, 4), np.float32)}, "images"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(3, np.int64)}, "labels"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(2, np.int32)}, "labels"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "paths": ["a"]}, "paths"),
    ],
)
def test_image_set_refuses_what_does_not_fit(arguments, named):
    with pytest.raises(ValueError, match=named):
        ImageSet(**arguments)


def test_labels_that_are_not_there_cannot_be_had():
    images, labels = np.zeros((2, 3, 4, 4), np.uint8), np.arange(2)
    assert ImageSet(images, labels).known_labels is labels
    with pytest.raises(ValueError, match="no labels"):
        ImageSet(images).known_labels  # noqa: B018


def test_an_image_set_is_shown_in_a_line():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    assert repr(ImageSet(images)) == "ImageSet([2, 3, 4, 4], no labels)"
    assert repr(ImageSet(images, np.zeros(2, np.int64))) == "ImageSet([2, 3, 4, 4], labelled)"


def test_statistics_are_exact_on_a_small_set():
    images = np.random.default_rng(0).integers(0, 200, (9, 3, 8, 7), np.uint8)
    statistics = pixel_statistics(images)
    scaled = images / 255
    gray = np.einsum("nchw,c->nhw", scaled, [0.299, 0.587, 0.114])
    np.testing.assert_allclose(statistics.mean, scaled.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, scaled.std((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(statistics.gray_mean, gray.mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics.gray_std, gray.std(), rtol=1e-5)


def test_a_constant_channel_can_still_be_divided_by():
    statistics = pixel_statistics(np.full((4, 3, 2, 2), 7, np.uint8))
    assert min(*statistics.std, statistics.gray_std) > 0


def test_statistics_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="none"):
        pixel_statistics(np.zeros((0, 3, 2, 2), np.uint8))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got 'imagenet'") as caught:
        load_dataset("imagenet")
    assert all(name in str(caught.value) for name in DATASETS)


def test_folder_needs_a_place():
    with pytest.raises(ValueError, match="--data-dir"):
        load_dataset("folder")


@pytest.mark.parametrize("name", ["stl10", "cifar10", "cifar100"])
def test_missing_data_says_what_to_do(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--download.*--data-dir"):
        load_dataset(name, tmp_path)
