"""Patch views: the window drawn for each image, against slicing by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cpc_ext.data import AUTO_AUGMENT, BatchShare, Dataset, ImageSet, PatchAugmentation, PatchView

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 10, 12), np.uint8))


def windows(patches: torch.Tensor) -> torch.Tensor:
    """Convert the patches of one-patch grids to windows of pixels in 0..255."""
    assert patches.shape[1:3] == (1, 1)
    return (patches[:, 0, 0] * 255).round().to(torch.uint8)


def test_random_windows_are_windows_of_their_image_flipped_or_not():
    drawn = windows(PatchView(8, 8, crop=8).random(IMAGES, torch.Generator().manual_seed(0)))
    found = []
    for image, window in zip(IMAGES, drawn, strict=True):
        places = [
            (y, x, flip)
            for y in range(3)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(window, image[:, y : y + 8, x : x + 8].flip(-1) if flip else image[:, y : y + 8, x : x + 8])
        ]
        assert len(places) == 1
        found += places
    # Every offset and both orientations occur among 64 images.
    assert {y for y, _, _ in found} == {0, 1, 2}
    assert {x for _, x, _ in found} == {0, 1, 2, 3, 4}
    assert {flip for _, _, flip in found} == {False, True}


def test_the_generator_decides():
    view = PatchView(4, 2, crop=(8, 6))
    first, again, other = (view.random(IMAGES, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (64, *view.grid(10, 12), 3, 4, 4) == (64, 3, 2, 3, 4, 4)


def test_no_flip_where_it_is_off():
    drawn = windows(PatchView(10, 1, crop=10, flip=False).random(IMAGES, torch.Generator().manual_seed(0)))
    for image, window in zip(IMAGES, drawn, strict=True):
        assert any(torch.equal(window, image[:, :, x : x + 10]) for x in range(3))


def test_center_is_the_middle_as_it_is():
    assert torch.equal(windows(PatchView(8, 8, crop=8).center(IMAGES)), IMAGES[:, :, 1:9, 2:10])


def test_without_crop_the_whole_image_is_cut():
    view = PatchView(4, 2)
    assert view.grid(10, 12) == (4, 5)
    assert view.center(IMAGES).shape == (64, 4, 5, 3, 4, 4)
    assert view.random(IMAGES[:0]).shape == (0, 4, 5, 3, 4, 4)


@pytest.mark.parametrize("gray", [False, True])
def test_a_datasets_view_normalises_by_its_statistics(gray):
    images = ImageSet(IMAGES.numpy())
    scaled = IMAGES.double() / 255
    luma = torch.einsum("bchw,c->bhw", scaled, torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64))
    dataset = Dataset(
        name="noise",
        pretrain=images,
        train=None,
        test=None,
        classes=(),
        mean=tuple(scaled.mean((0, 2, 3)).tolist()),
        std=tuple(scaled.std((0, 2, 3), correction=0).tolist()),
        gray_mean=luma.mean().item(),
        gray_std=luma.std(correction=0).item(),
    )
    patches = PatchView.of(dataset, 2, 2, gray=gray, dtype=torch.float64).center(IMAGES)
    channels = patches.transpose(0, 3).flatten(1)
    assert len(channels) == (1 if gray else 3)
    torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        channels.std(1, correction=0), torch.ones(len(channels), dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_too_large_a_crop_is_an_error():
    view = PatchView(4, 2, crop=11)
    with pytest.raises(ValueError, match=r"10x12.* got 11x11"):
        view.random(IMAGES)
    with pytest.raises(ValueError, match="crop"):
        view.center(IMAGES)


def test_padding_is_black_and_cropped_like_the_image():
    view = PatchView(12, 12, crop=12, pad=2, flip=False)
    padded = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2))
    assert view.grid(10, 12) == (1, 1)
    for image, window in zip(padded, windows(view.random(IMAGES, torch.Generator().manual_seed(0))), strict=True):
        assert any(torch.equal(window, image[:, y : y + 12, x : x + 12]) for y in range(3) for x in range(5))
    assert torch.equal(windows(view.center(IMAGES)), padded[:, :, 1:13, 2:14])
    small = PatchView(8, 8, crop=8)
    assert torch.equal(replace(small, pad=3).center(IMAGES), small.center(IMAGES))


AUGMENTED = PatchView(4, 2, crop=8, augmentation=PatchAugmentation())


def test_augmentation_changes_training_patches_alone():
    plain = replace(AUGMENTED, augmentation=None)
    first, again, other = (AUGMENTED.random(IMAGES, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape == (64, 3, 3, 3, 4, 4)
    changed = (first != plain.random(IMAGES, torch.Generator().manual_seed(1))).flatten(3).any(3)
    assert changed.float().mean() > 0.9
    assert not torch.equal(first, other)
    assert torch.equal(AUGMENTED.center(IMAGES), plain.center(IMAGES))
    shown = AUGMENTED.augmented(IMAGES, torch.Generator().manual_seed(1))
    assert (shown != plain.center(IMAGES)).flatten(3).any(3).float().mean() > 0.9
    assert torch.equal(plain.augmented(IMAGES), plain.center(IMAGES))


def test_augmentation_leaves_the_windows_as_they_are():
    nothing = PatchAugmentation(
        (), elastic_probability=0, histogram_probability=0, jitter_probability=0, gray_probability=0, crop=1
    )
    drawn = replace(AUGMENTED, augmentation=nothing).random(IMAGES, torch.Generator().manual_seed(1))
    plain = replace(AUGMENTED, augmentation=None).random(IMAGES, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, plain, atol=1e-6, rtol=0)


def test_parts_of_a_batch_are_augmented_as_the_whole():
    transforms = tuple(name for name in AUTO_AUGMENT if name != "sample_pairing")
    view = replace(AUGMENTED, augmentation=PatchAugmentation(transforms), pad=1)
    whole = view.random(IMAGES, torch.Generator().manual_seed(1))
    parts = [
        view.random(images, torch.Generator().manual_seed(1), share=BatchShare(rank, 2))
        for rank, images in enumerate(IMAGES.chunk(2))
    ]
    assert torch.equal(torch.cat(parts), whole)
