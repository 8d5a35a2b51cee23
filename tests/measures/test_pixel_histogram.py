"""The histogram that a PixelCNN must beat: its dependence on position and colour, against its plain formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpc_ext.measures.pixel_histogram import static_histogram_bits_per_dim


def test_static_histogram_knows_places():
    rng = np.random.default_rng(0)
    # Each place has a value of its own, one of 8 at random: 3 bits, where a histogram of all places needs more.
    places = rng.integers(0, 31, (3, 5, 6)) * 8
    train, test = (places + rng.integers(0, 8, (count, 3, 5, 6)) for count in (2000, 500))
    bits = static_histogram_bits_per_dim(train.astype(np.uint8), test.astype(np.uint8))
    assert 3 <= bits < 3.05


def test_static_histogram_of_few_images_is_that_of_a_colour():
    rng = np.random.default_rng(0)
    # Nothing depends on the place, and three images tell little of one: 4 bits for every colour.
    shift = np.array([0, 64, 128])[:, None, None]
    train, test = (rng.integers(0, 16, (count, 3, 32, 32)) + shift for count in (3, 50))
    bits = static_histogram_bits_per_dim(train.astype(np.uint8), test.astype(np.uint8))
    assert 4 <= bits < 4.15  # Some probability is left for values that never occurred.


@pytest.mark.parametrize("seed", range(4))
def test_static_histogram_of_one_image_knows_no_places(seed):
    rng = np.random.default_rng(seed)
    train, test = (rng.integers(0, 16, (1, 1, 16, 16)).astype(np.uint8) for _ in range(2))
    overall = (np.bincount(train.ravel(), minlength=256) + 1) / (train.size + 256)
    expected = -np.log2(overall[test]).mean()
    assert static_histogram_bits_per_dim(train, test) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("train_count", "colors"), [(20, 1), (6, 3)])
def test_static_histogram_is_the_plain_formula(train_count, colors):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 4, (count, colors, 2, 3)).astype(np.uint8) for count in (train_count, 5))
    train[:, -1] += 40  # A colour of its own.
    overall = [(np.bincount(train[:, c].ravel(), minlength=256) + 1) / (train[:, c].size + 256) for c in range(colors)]

    def bits(strength, images, leave_out):
        total = 0.0
        for index, image in enumerate(images):
            kept = np.delete(train, index, 0) if leave_out else train
            for (color, row, col), value in np.ndenumerate(image):
                count = (kept[:, color, row, col] == value).sum()
                total -= math.log2((count + strength * overall[color][value]) / (len(kept) + strength))
        return total / images.size

    best = min((1, 3, 10, 30, 100, 300, 1e3, 1e4, 1e6), key=lambda each: bits(each, train, leave_out=True))
    assert static_histogram_bits_per_dim(train, test) == pytest.approx(bits(best, test, leave_out=False), rel=1e-9)
