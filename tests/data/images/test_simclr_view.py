"""SimCLR's views: each transform against Pillow, colorsys or a closed form, and the random draws for each image."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cpc_ext.data import BatchShare, SimCLRView
from cpc_ext.data.images.simclr_view import adjust_hue, blend, blur, crop_and_resize, luma

LEVEL = 1 / 255


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("size", [8, 20, 48])
def test_crop_and_resize_is_pillows_bilinear(size):
    images = noise(3, 3, 30, 40)
    box = torch.tensor([[0.0, 0.0, 30.0, 40.0], [3.25, 7.5, 20.75, 9.0], [11.0, 12.0, 5.5, 28.0]])
    resized = crop_and_resize(images.float() / 255, box, size)
    for image, (top, left, height, width), ours in zip(images, box.tolist(), resized, strict=True):
        for channel in range(3):
            theirs = Image.fromarray(image[channel].numpy()).resize(
                (size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
            )
            # Pillow rounds to levels after the columns and after the rows.
            expected = torch.from_numpy(np.array(theirs)).float() / 255
            assert (ours[channel] - expected).abs().max() < 1.5 * LEVEL


def test_whole_image_at_its_own_size_stays_as_it_is_and_flips():
    images = noise(2, 3, 12, 12).float() / 255
    box = torch.tensor([[0.0, 0.0, 12.0, 12.0]]).expand(2, 4)
    ours = crop_and_resize(images, box, 12, flip=torch.tensor([False, True]))
    torch.testing.assert_close(ours[0], images[0])
    torch.testing.assert_close(ours[1], images[1].flip(2))


def test_luma_is_pillows():
    image = noise(3, 9, 9)
    expected = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))).float() / 255
    assert (luma(image[None].float() / 255)[0, 0] - expected).abs().max() <= LEVEL


@pytest.mark.parametrize(("size", "scale", "side"), [(12, 1.0, 12), (20, 1.6, 32), (24, 0.5, 12), (15, 1.1, 16)])
def test_whole_images_are_larger_than_views_by_their_scale(size, scale, side):
    images = noise(2, 3, 32, 32)
    view = SimCLRView(size, center_scale=scale, blur_kernel=0)
    assert view.random_pair(images).shape == (2, 2, 3, size, size)
    whole = view.center(images)
    torch.testing.assert_close(whole, SimCLRView(side, blur_kernel=0).center(images), rtol=0, atol=0)
    if side == 32:
        torch.testing.assert_close(whole, images / 255)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(16, 23, 0, 3), (20, 16, 2, 0)])
def test_images_that_are_not_square_are_judged_by_their_middle(height, width, top, left):
    images = noise(2, 3, height, width)
    middle = images[:, :, top : top + 16, left : left + 16] / 255
    torch.testing.assert_close(SimCLRView(16, blur_kernel=0).center(images), middle)
    smaller = SimCLRView(8, blur_kernel=0)
    torch.testing.assert_close(smaller.center(images), smaller.center((middle * 255).round().to(torch.uint8)))


def test_a_scale_that_leaves_no_pixel_is_refused():
    with pytest.raises(ValueError, match=r"center_scale: 0.01 leaves no pixel of 20"):
        SimCLRView(20, center_scale=0.01)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_hue_is_colorsys(turn):
    image = noise(3, 6, 6)
    image[:, 0] = 77  # A row of grey, which has no hue.
    pixels = image.float() / 255
    turned = adjust_hue(pixels[None], torch.tensor([turn]))[0]
    for row in range(6):
        for column in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixels[:, row, column].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            assert turned[:, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_blend_is_linear_and_stays_in_range():
    images, other = torch.tensor([[[[0.2, 0.9]]]]).expand(3, 1, 1, 2), torch.tensor(0.5)
    blended = blend(images, other, torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(blended[:, 0, 0], torch.tensor([[0.5, 0.5], [0.2, 0.9], [0.0, 1.0]]))


def test_blur_is_a_mirrored_gaussian_convolution():
    images = noise(2, 3, 11, 14).float() / 255
    sigma, taps = torch.tensor([0.7, 1.9]), 5
    ours = blur(images, sigma, taps)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    for image, deviation, mine in zip(padded, sigma.tolist(), ours, strict=True):
        line = torch.tensor([math.exp(-0.5 * (offset / deviation) ** 2) for offset in range(-2, 3)])
        kernel = torch.outer(line, line) / line.sum() ** 2
        torch.testing.assert_close(mine, F.conv2d(image[:, None], kernel[None, None])[:, 0])


def test_pair_has_the_shape_type_and_layout_asked_for():
    view = SimCLRView(16, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=torch.bfloat16, channels_last=True)
    pair = view.random_pair(noise(4, 3, 24, 20), torch.Generator().manual_seed(1))
    assert pair.shape == (2, 4, 3, 16, 16)
    assert pair.dtype == torch.bfloat16
    assert pair[0].is_contiguous(memory_format=torch.channels_last)
    assert pair.float().abs().max() <= 2.0
    assert not torch.equal(pair[0], pair[1])


def test_seed_determines_the_views():
    view, images = SimCLRView(16), noise(4, 3, 24, 24)
    one, same, other = (view.random_pair(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_processes_together_make_the_views_of_one():
    view, images = SimCLRView(16), noise(6, 3, 24, 24)
    whole = view.random_pair(images, torch.Generator().manual_seed(3))
    parts = [
        view.random_pair(part, torch.Generator().manual_seed(3), share=BatchShare(rank, 3))
        for rank, part in enumerate(images.chunk(3))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_windows_lie_in_the_image_and_have_the_areas_and_ratios_asked_for():
    view = SimCLRView(16, min_area=0.25)
    top, left, height, width = view._draw_box(2000, 40, 60, torch.Generator().manual_seed(0)).unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 40 + 1e-4
    assert (left + width).max() <= 60 + 1e-4
    uncut = (height < 40) & (width < 60)
    assert uncut.float().mean() > 0.5
    area, ratio = (height * width / 2400)[uncut], (width / height)[uncut]
    assert area.min() >= 0.25 - 1e-4
    assert ratio.min() >= 3 / 4 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4


def test_aspect_ratios_are_drawn_evenly_on_a_logarithmic_scale():
    """As in SimCLR and torchvision's RandomResizedCrop, so that wide and tall windows are equally frequent."""
    view = SimCLRView(16, min_area=0.08)
    *_, height, width = view._draw_box(40_000, 100, 100, torch.Generator().manual_seed(0)).unbind(1)
    # No window of at most 70 % of the area is cut, whatever its ratio.
    ratio = (width / height)[height * width < 7000].double().sort().values
    low, high = math.log(3 / 4), math.log(4 / 3)
    share = (ratio.log() - low) / (high - low)
    # Kolmogorov's distance from evenly spread, beyond 1.95 / sqrt(N) in one of a thousand cases; drawn linearly: 0.07.
    distance = (share - torch.linspace(0, 1, len(share), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / math.sqrt(len(share)) < 0.013


@pytest.mark.parametrize("share", ["flip", "gray", "jitter"])
def test_shares_of_views_that_change(share):
    """With all else turned off, as many views of whole images differ from the image as the share says."""
    jitter = (0.5, 0.5, 0.5, 0.1) if share == "jitter" else (0.0,) * 4
    view = SimCLRView(8, min_area=1.0, jitter=jitter, gray_probability=0.2 if share == "gray" else 0.0, blur_kernel=0)
    images = noise(1, 3, 8, 8).expand(2000, 3, 8, 8)
    boxes = view._draw_box
    object.__setattr__(view, "_draw_box", lambda batch, h, w, g: boxes(batch, h, w, g) * 0 + torch.tensor([0, 0, h, w]))
    views = view.random_pair(images, torch.Generator().manual_seed(0))[0]
    plain = images.float() / 255
    same = (views - plain).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (views - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    unchanged = (same | mirrored).float().mean().item()
    if share == "flip":
        assert unchanged == 1.0
        assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
    else:
        assert unchanged == pytest.approx(0.8 if share == "gray" else 0.2, abs=0.04)


def test_images_of_one_channel():
    pair = SimCLRView(8, blur_kernel=3).random_pair(noise(3, 1, 10, 10), torch.Generator().manual_seed(0))
    assert pair.shape == (2, 3, 1, 8, 8)


@pytest.mark.parametrize("kernel", [4, 17])
def test_blur_kernel_that_does_not_fit(kernel):
    with pytest.raises(ValueError, match=f"blur_kernel: expected an odd number below 2 \\* 8, got {kernel}"):
        SimCLRView(8, blur_kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_only_bytes_are_images(dtype):
    view, images = SimCLRView(8, blur_kernel=0), torch.ones(2, 3, 10, 10, dtype=dtype)
    for seen in (view.center, view.random, view.random_pair):
        with pytest.raises(TypeError, match=f"images must be uint8, got {dtype}"):
            seen(images)
