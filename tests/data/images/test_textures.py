"""The synthetic textures: reproducible, balanced, and not linearly separable by pixels, colours or histograms."""

import numpy as np
import pytest

from cpc_ext.data import load_dataset
from cpc_ext.data.images.drawn.textures import FAMILIES, SPLIT_SIZES, make_textures

GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def pixels(images: np.ndarray) -> np.ndarray:
    gray = np.einsum("nchw,c->nhw", images.astype(np.float32), GRAY)
    return gray.reshape(len(gray), 16, 6, 16, 6).mean((2, 4)).reshape(len(gray), -1)


def colours(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(*images.shape[:2], -1).astype(np.float32)
    return np.concatenate([flat.mean(2), flat.std(2)], axis=1)


def histograms(images: np.ndarray) -> np.ndarray:
    gray = np.einsum("nchw,c->nhw", images.astype(np.float32), GRAY).reshape(len(images), -1)
    gray = (gray - gray.mean(1, keepdims=True)) / gray.std(1, keepdims=True)
    return np.stack([np.histogram(g, bins=24, range=(-3, 3))[0] for g in gray]).astype(np.float32)


def spectra(images: np.ndarray) -> np.ndarray:
    """Return the logarithms of the 200 largest magnitudes of the spectrum: not first-order, and free of position."""
    gray = np.einsum("nchw,c->nhw", images.astype(np.float32), GRAY)
    gray = (gray - gray.mean((1, 2), keepdims=True)) / gray.std((1, 2), keepdims=True)
    power = np.sort(np.abs(np.fft.rfft2(gray)).reshape(len(gray), -1), axis=1)[:, ::-1]
    return np.log(power[:, :200])


def ridge_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (np.c_[(x - mean) / std, np.ones(len(x))] for x in (train, test))
    penalty = 100 * np.eye(train.shape[1])
    weights = np.linalg.solve(train.T @ train + penalty, train.T @ np.eye(len(FAMILIES))[labels])
    return float(((test @ weights).argmax(1) == truth).mean())


@pytest.fixture(scope="module")
def splits():
    return make_textures(3000, split="train"), make_textures(1000, split="test")


@pytest.mark.parametrize("features", [pixels, colours, histograms])
def test_first_order_features_are_near_chance(splits, features):
    train, test = splits
    accuracy = ridge_accuracy(features(train.images), train.labels, features(test.images), test.labels)
    assert accuracy < 0.2


def test_structure_is_there_to_be_learnt(splits):
    train, test = splits
    accuracy = ridge_accuracy(spectra(train.images), train.labels, spectra(test.images), test.labels)
    assert accuracy > 0.4


def test_same_seed_same_bytes_and_prefix():
    longer = make_textures(130, seed=3)
    shorter = make_textures(107, seed=3)
    np.testing.assert_array_equal(longer.images[:107], shorter.images)
    np.testing.assert_array_equal(longer.labels[:107], shorter.labels)
    assert longer.images.dtype == np.uint8
    assert longer.images.shape == (130, 3, 96, 96)


def test_seeds_and_splits_share_no_image():
    sets = [make_textures(100, split=split, seed=seed) for split in SPLIT_SIZES for seed in (0, 1)]
    images = [image.tobytes() for drawn in sets for image in drawn.images]
    assert len(set(images)) == len(images)


def test_every_prefix_is_balanced():
    labels = make_textures(55).labels
    counts = np.bincount(labels, minlength=len(FAMILIES))
    assert counts.max() - counts.min() <= 1


def test_size_and_empty():
    assert make_textures(20, size=40).images.shape == (20, 3, 40, 40)
    assert len(make_textures(0)) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"count": -1}, "count"),
        ({"count": 1, "seed": -1}, "seed"),
        ({"count": 1, "split": "val"}, "split"),
        ({"count": 1, "size": 8}, "size"),
    ],
)
def test_bad_arguments_name_themselves(arguments, named):
    with pytest.raises(ValueError, match=named):
        make_textures(**arguments)


def test_load_dataset_default_splits():
    dataset = load_dataset("textures", image_size=32)
    assert {s: len(getattr(dataset, s)) for s in SPLIT_SIZES} == SPLIT_SIZES
    assert dataset.classes == tuple(FAMILIES)
    assert dataset.image_shape == (3, 32, 32)
    values = dataset.pretrain.images / np.float64(255)
    np.testing.assert_allclose(dataset.mean, values.mean((0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(dataset.gray_std, np.einsum("nchw,c->nhw", values, GRAY).std(), atol=0.02)
