"""Synthetic textures: ten families of patterns, generated from a seed in seconds, without a download.

An image is filled with one texture, whose family shows in its spatial structure alone. Each family is a function that
assigns a height to every point of the plane. Each image's heights are thresholded at quantiles, drawn from the same
distribution for all families, which makes the pixel histograms the same. Colour, lighting, scale, rotation, position,
bending and noise do not depend on the family either, so that only structure predicts the label. Periods lie between 10
and 22 pixels: a patch of 16 pixels shows part of the pattern, and its neighbours can be predicted from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.statistics import pixel_statistics

Field = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]

SPLIT_SIZES = {"pretrain": 4000, "train": 2000, "test": 1000}
PERIOD_PIXELS = (10.0, 22.0)
# Every block of images has its own seed, so that a smaller set is a prefix of a larger one. A family's share of a block
# (10 images, 360 KB as float32) fits into the cache of one core.
BLOCK = 100


def _to_line(t: np.ndarray) -> np.ndarray:
    """Distance from t to the nearest integer, 0..0.5: a triangle wave, the distance to lines one period apart."""
    distance: np.ndarray = np.abs(t - np.rint(t))
    return distance


def _stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _to_line(u)


def _zigzag(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Lines at +45° and -45° in turn; the factor keeps the distance across a line at one period.
    return _to_line(np.float32(0.5**0.5) * (u + 2 * _to_line(v / 2)))


def _rings(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = rng.random((len(u), 1, 1), dtype=np.float32)
    return _to_line(np.sqrt(u * u + v * v) + phase)


def _checks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Positive in one colour's squares, negative in the other's, by the distance to the nearest side.
    a, b = _to_line(u / 1.5) - np.float32(0.25), _to_line(v / 1.5) - np.float32(0.25)
    height: np.ndarray = np.copysign(np.minimum(np.abs(a), np.abs(b)), a * b)
    return height


def _grid(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height: np.ndarray = np.minimum(_to_line(u), _to_line(v))
    return height


def _bricks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    course = v / 0.8
    shift = (np.floor(course).astype(np.int32) & 1) * np.float32(0.5)
    height: np.ndarray = np.minimum(0.8 * _to_line(course), 2 * _to_line(u / 2 + shift))
    return height


def _dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # A triangular lattice is two rectangular ones, the second in the middle of the first's cells.
    w = v / np.float32(3**0.5)
    corner = _to_line(u) ** 2 + 3 * _to_line(w) ** 2
    middle = _to_line(u + 0.5) ** 2 + 3 * _to_line(w + 0.5) ** 2
    height: np.ndarray = np.minimum(corner, middle)
    return height


def _triangles(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Three sets of lines 60° apart whose coordinates sum to zero, so that they always cross three at a point.
    a = u / 1.2
    b = np.float32(3**0.5 / 2) * v / 1.2 - a / 2
    height: np.ndarray = np.minimum(np.minimum(_to_line(a), _to_line(b)), _to_line(a + b))
    return height


def _cells(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Voronoi cells of a jittered lattice: the height is the distance to the second-nearest point minus that to the
    # nearest. The jitter comes from a table that wraps around and is wider than any image is in periods.
    side = 32
    jitter = rng.uniform(0.1, 0.9, (2, len(u), side, side)).astype(np.float32)
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    image = np.arange(len(u))[:, None, None] * side
    du, dv = u - column, v - row
    nearest = np.full(u.shape, np.inf, np.float32)
    second = nearest.copy()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            entry = (image + ((row + dy) & (side - 1))) * side + ((column + dx) & (side - 1))
            distance = (du - dx - jitter[0].ravel()[entry]) ** 2 + (dv - dy - jitter[1].ravel()[entry]) ** 2
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
    height: np.ndarray = np.sqrt(second) - np.sqrt(nearest)
    return height


def _weave(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Square tiles with two strands each, running across and down in turn.
    u, v = u / 1.25, v / 1.25
    across = ((np.floor(u).astype(np.int32) + np.floor(v).astype(np.int32)) & 1).astype(bool)
    height: np.ndarray = np.where(across, _to_line(2 * u), _to_line(2 * v))
    return height


FAMILIES: dict[str, Field] = {
    "stripes": _stripes,
    "zigzag": _zigzag,
    "rings": _rings,
    "checks": _checks,
    "grid": _grid,
    "bricks": _bricks,
    "dots": _dots,
    "triangles": _triangles,
    "cells": _cells,
    "weave": _weave,
}


def _family_block(field: Field, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` images of one family: uint8 [count, 3, size, size]."""

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(shape or (1, 1)))).astype(np.float32)

    # Coordinates of each pixel in the pattern: bend, move, turn, scale.
    y = np.arange(size, dtype=np.float32)[:, None] - uniform(0.25 * size, 0.75 * size)
    x = np.arange(size, dtype=np.float32)[None, :] - uniform(0.25 * size, 0.75 * size)
    bend = [uniform(0, 3) * np.sin(2 * np.pi * (t / uniform(60, 160) + uniform(0, 1))) for t in (x, y)]
    y, x = y + bend[0], x + bend[1]
    angle = uniform(0, 2 * np.pi)
    low, high = np.log(PERIOD_PIXELS)
    period = np.exp(uniform(low, high))
    cos, sin = np.cos(angle) / period, np.sin(angle) / period
    height = field(cos * x + sin * y, cos * y - sin * x, rng)

    # The share of ink and of soft edge is the same in every family because both are quantiles of the height.
    ink = rng.uniform(0.35, 0.65, count)
    edge = rng.uniform(0.05, 0.15, count)
    ranked = np.sort(height[:, ::2, ::2].reshape(count, -1), axis=1)
    image = np.arange(count)
    below = ranked[image, ((ink - edge) * ranked.shape[1]).astype(int)][:, None, None]
    above = ranked[image, ((ink + edge) * ranked.shape[1]).astype(int)][:, None, None]
    pattern = np.clip((height - below) / np.maximum(above - below, 1e-6), 0, 1)

    # Two colours that differ by a step in brightness, with random tints; either may be the lighter one.
    step = uniform(0.2, 0.6, 1) * np.where(rng.random((count, 1)) < 0.5, -1, 1).astype(np.float32)
    middle = uniform(0.35, 0.65, 1)
    ground = middle - step / 2 + uniform(-0.15, 0.15, 3)
    ink_step = step + uniform(-0.15, 0.15, 3)
    slope = uniform(0, 0.3)
    direction = uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + slope * (np.cos(direction) * ramp[:, None] + np.sin(direction) * ramp[None, :])
    noise = uniform(0, 0.06) * rng.standard_normal((count, size, size), dtype=np.float32) + 0.5 / 255
    images = np.empty((count, 3, size, size), np.uint8)
    for channel in range(3):
        shade = ground[:, channel, None, None] + pattern * ink_step[:, channel, None, None]
        images[:, channel] = np.clip(shade * light + noise, 0, 1) * 255
    return images


def make_textures(count: int, *, split: str = "pretrain", size: int = 96, seed: int = 0) -> ImageSet:
    """Draw `count` labelled RGB textures of size by size pixels.

    Labels cycle through the ten families, so that every prefix is balanced. The same seed gives the same images, and a
    smaller count gives the first of them. The splits "pretrain", "train" and "test" have their own seeds and share no
    image. Raises ValueError for a negative count or seed, an unknown split, or a size below 16.
    """
    if count < 0:
        raise ValueError(f"count: expected 0 or more, got {count}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if split not in SPLIT_SIZES:
        raise ValueError(f"split: expected one of {', '.join(SPLIT_SIZES)}, got {split!r}")
    if size < 16:
        raise ValueError(f"size: expected at least 16 pixels, got {size}")
    families = len(FAMILIES)
    images = np.empty((count, 3, size, size), np.uint8)
    for start in range(0, count, BLOCK):
        block = images[start : start + BLOCK]
        for label, field in enumerate(FAMILIES.values()):
            entropy = (seed, list(SPLIT_SIZES).index(split), start // BLOCK, label)
            drawn = _family_block(field, BLOCK // families, size, np.random.default_rng(entropy))
            places = block[label::families]
            places[:] = drawn[: len(places)]
    return ImageSet(images=images, labels=np.arange(count, dtype=np.int64) % families)


def load(*, size: int = 96, seed: int = 0) -> Dataset:
    """Generate the texture dataset: 4000 images to pretrain on, 2000 and 1000 more to train and test probes with."""
    splits = {split: make_textures(count, split=split, size=size, seed=seed) for split, count in SPLIT_SIZES.items()}
    statistics = pixel_statistics(splits["pretrain"].images)
    return Dataset(
        name="textures",
        pretrain=splits["pretrain"],
        train=splits["train"],
        test=splits["test"],
        classes=tuple(FAMILIES),
        **asdict(statistics),
    )
