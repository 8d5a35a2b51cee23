"""Batches by index: the right images with any memory layout, and clear errors for indices outside the set."""

import numpy as np
import pytest
import torch

from cpc_ext.data import ImageFetcher, ImageSet

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 3, 6, 5), np.uint8)


def layouts(folder) -> dict[str, np.ndarray]:
    mapped = np.memmap(folder / "images.bin", np.uint8, "w+", shape=IMAGES.shape)
    mapped[:] = IMAGES
    records = np.zeros((7, 1 + IMAGES[0].size), np.uint8)
    records[:, 1:] = IMAGES.reshape(7, -1)
    return {
        "plain": IMAGES,
        "read-only map": np.memmap(folder / "images.bin", np.uint8, "r", shape=IMAGES.shape),
        "columns first": np.ascontiguousarray(IMAGES.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2),
        "channels last": np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "records": records[:, 1:].reshape(IMAGES.shape),
        "every other, backwards": np.repeat(IMAGES[::-1], 2, axis=0)[::-2],
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("resident", [False, True])
def test_every_layout_gives_the_same_batches(tmp_path, resident):
    indices = np.array([3, 0, 6, 3])
    for name, images in layouts(tmp_path).items():
        batch = ImageFetcher(ImageSet(images), resident=resident)(indices)
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch.numpy(), IMAGES[indices], err_msg=name)


def test_a_batch_is_a_copy():
    images = IMAGES.copy()
    ImageFetcher(ImageSet(images))([1, 2]).zero_()
    np.testing.assert_array_equal(images, IMAGES)


def test_empty_batch():
    assert ImageFetcher(ImageSet(IMAGES))([]).shape == (0, 3, 6, 5)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("index", [-1, 7])
def test_outside_indices_are_errors(index, resident):
    with pytest.raises(IndexError, match=r"0\.\.6"):
        ImageFetcher(ImageSet(IMAGES), resident=resident)([0, index])


@pytest.mark.parametrize("indices", [[0.5], [[0]], [True]])
def test_other_indices_are_errors(indices):
    with pytest.raises(TypeError, match="integers"):
        ImageFetcher(ImageSet(IMAGES))(indices)


@pytest.mark.cuda
@pytest.mark.parametrize("resident", [False, True, None])
def test_on_cuda(tmp_path, resident):
    indices = [5, 1]
    for name, images in layouts(tmp_path).items():
        fetch = ImageFetcher(ImageSet(images), "cuda", resident=resident)
        batch = fetch(indices)
        assert batch.device.type == "cuda"
        assert fetch.resident is (resident is not False)
        np.testing.assert_array_equal(batch.cpu().numpy(), IMAGES[indices], err_msg=name)
