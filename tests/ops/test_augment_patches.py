"""augment_patches: every transform against Pillow on patches of photographs, and the kernels against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from cpc_ext.ops import AugmentationPlan, Transform, augment_patches, extract_patches
from cpc_ext.ops._patch_options import PatchOptions
from cpc_ext.ops.augment_patches import augment_patches_reference

PHOTOS = Path(__file__).parents[1] / "data" / "photos"
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# As in test_extract_patches.py: patches are of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FILL = 128


@pytest.fixture(scope="session")
def photos() -> torch.Tensor:
    """uint8 [8, 3, 32, 32]: photographs of CIFAR-10's test images."""
    images = [np.array(Image.open(path).convert("RGB")) for path in sorted(PHOTOS.glob("*.jpg"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def grid(images: torch.Tensor, patch_size: int, stride: int) -> tuple[int, int, int]:
    return len(images), *((side - patch_size) // stride + 1 for side in images.shape[2:])


def one_transform(images, patch_size, stride, transform, parameters=(), **rest) -> AugmentationPlan:
    """The same transform for every patch."""
    cells = grid(images, patch_size, stride)
    codes = torch.full((*cells, 1), int(transform), dtype=torch.uint8)
    values = torch.zeros(*cells, 1, 3)
    values[..., : len(parameters)] = torch.tensor(parameters)
    return AugmentationPlan(codes, values, **{"fill": FILL} | rest)


def augmented_bytes(images, patch_size, stride, plan, device) -> torch.Tensor:
    """Return augmented patches [N, C, p, p] as whole numbers 0..255."""
    patches = augment_patches(images.to(device), patch_size, stride, plan.to(device)).cpu().flatten(0, 2)
    levels = (patches * 255).round()
    assert (patches * 255 - levels).abs().max() < 1e-3
    return levels.long()


def random_plan(cells, steps, patch_size, seed=0, codes=None) -> AugmentationPlan:
    """Return a plan of any transforms with any parameters, including usual ones."""
    generator = torch.Generator().manual_seed(seed)
    if codes is None:
        codes = torch.randint(len(Transform), (*cells, steps), generator=generator)
    unit = torch.rand(*cells, steps, 3, generator=generator)
    scale = torch.ones(len(Transform))
    for transform, most in (
        (Transform.SHEAR_X, 0.6),
        (Transform.SHEAR_Y, 0.6),
        (Transform.TRANSLATE_X, patch_size),
        (Transform.TRANSLATE_Y, patch_size),
        (Transform.ROTATE, 90),
        (Transform.SOLARIZE, 256),
        (Transform.POSTERIZE, 9),
        (Transform.CONTRAST, 2),
        (Transform.COLOR, 2),
        (Transform.BRIGHTNESS, 2),
        (Transform.SHARPNESS, 2),
        (Transform.CUTOUT, patch_size),
        (Transform.TONE_CURVE, 2),
        (Transform.CROP, patch_size),
    ):
        scale[transform] = most
    signed = torch.tensor([Transform.SHEAR_X, Transform.SHEAR_Y, Transform.TRANSLATE_X, Transform.TRANSLATE_Y])
    signed = torch.cat([signed, torch.tensor([Transform.ROTATE, Transform.TONE_CURVE, Transform.HUE])])
    unit = torch.where(torch.isin(codes, signed)[..., None], unit - 0.5, unit)
    count = cells[0] * cells[1] * cells[2]
    return AugmentationPlan(
        codes.to(torch.uint8),
        unit * scale[codes][..., None],
        torch.randint(max(count, 1), cells, generator=generator),
        (torch.rand(*cells, 2, 4, 4, generator=generator) - 0.5) * 0.4 * patch_size,
        FILL,
    )


def reference(images, patch_size, stride, plan, *, crop=None, offsets=None, flip=None, gray=False, **rest):
    """Compute the expected patches: the op's bytes, normalised in float64."""
    window = *(crop or images.shape[2:]), offsets, flip
    options = PatchOptions(patch_size, stride, *window, gray, **rest | {"dtype": torch.float64})
    return augment_patches_reference(images, options, plan)


# --- Each transform is Pillow's ---


def affine(matrix: Callable) -> Callable:
    def transform(image, value):
        fill = (FILL,) * len(image.getbands())
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix(value), Image.Resampling.NEAREST, fillcolor=fill
        )

    return transform


def enhance(kind: Callable) -> Callable:
    return lambda image, factor: kind(image).enhance(factor)


def cutout(image, top, left, side):
    image = image.copy()
    if side > 0:
        box = [left, top, left + side - 1, top + side - 1]
        ImageDraw.Draw(image).rectangle(box, fill=(FILL,) * len(image.getbands()))
    return image


def hue(image, turns):
    hues, saturation, value = image.convert("HSV").split()
    turned = np.array(hues) + np.int32(turns * 255).astype(np.uint8)  # Wraps around.
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def crop(image, top, left, side):
    padded = Image.new(image.mode, image.size, (FILL,) * len(image.getbands()))
    at = (image.size[0] - side) // 2
    padded.paste(image.crop((left, top, left + side, top + side)), (at, at))
    return padded


SHEARS = [(value,) for value in (-0.3, -0.17, 0.0, 0.05, 0.3, 1.0)]
SHIFTS = [(value,) for value in (-7.25, -3.5, -0.3, 0.0, 0.5, 2.0, 40.0)]
FACTORS = [(value,) for value in (0.0, 0.1, 0.5, 0.77, 1.0, 1.23, 1.9)]
PILLOW = {
    Transform.SHEAR_X: (affine(lambda s: (1, s, 0, 0, 1, 0)), SHEARS),
    Transform.SHEAR_Y: (affine(lambda s: (1, 0, 0, s, 1, 0)), SHEARS),
    Transform.TRANSLATE_X: (affine(lambda d: (1, 0, d, 0, 1, 0)), SHIFTS),
    Transform.TRANSLATE_Y: (affine(lambda d: (1, 0, 0, 0, 1, d)), SHIFTS),
    Transform.ROTATE: (
        lambda image, degrees: image.rotate(degrees, fillcolor=(FILL,) * len(image.getbands())),
        [(value,) for value in (-180.0, -90.0, -30.0, -17.3, 0.0, 5.0, 29.9, 45.0, 90.0, 200.0)],
    ),
    Transform.AUTOCONTRAST: (ImageOps.autocontrast, [()]),
    Transform.INVERT: (ImageOps.invert, [()]),
    Transform.EQUALIZE: (ImageOps.equalize, [()]),
    Transform.SOLARIZE: (ImageOps.solarize, [(value,) for value in (0.0, 1.0, 100.0, 127.5, 255.0, 256.0)]),
    Transform.POSTERIZE: (lambda image, bits: ImageOps.posterize(image, int(bits)), [(v,) for v in range(1, 9)]),
    Transform.CONTRAST: (enhance(ImageEnhance.Contrast), FACTORS),
    Transform.COLOR: (enhance(ImageEnhance.Color), FACTORS),
    Transform.BRIGHTNESS: (enhance(ImageEnhance.Brightness), FACTORS),
    Transform.SHARPNESS: (enhance(ImageEnhance.Sharpness), FACTORS),
    Transform.CUTOUT: (cutout, [(3, 4, 5), (-2, 7, 6), (0, 0, 0), (13, 13, 8)]),
    Transform.HUE: (hue, [(value,) for value in (-0.5, -0.1, -0.013, 0.0, 0.1, 0.2, 0.37, 0.5)]),
    Transform.GRAY: (lambda image: image.convert("L").convert("RGB"), [()]),
    Transform.CROP: (crop, [(0, 1, 15), (3, 2, 11), (1, 1, 2), (0, 0, 16)]),
}
COLOURFUL = [Transform.COLOR, Transform.HUE, Transform.GRAY]


@pytest.mark.parametrize("transform", PILLOW, ids=lambda transform: transform.name.lower())
def test_transform_is_pillows(device, photos, transform):
    theirs, magnitudes = PILLOW[transform]
    images = photos if device.type == "cuda" else photos[:2]
    for (patch_size, stride), parameters in itertools.product(((16, 8), (32, 1)), magnitudes):
        plan = one_transform(images, patch_size, stride, transform, parameters)
        ours = augmented_bytes(images, patch_size, stride, plan, device)
        cut = (extract_patches(images, patch_size, stride) * 255).round().to(torch.uint8).flatten(0, 2)
        for patch, actual in zip(cut, ours, strict=True):
            expected = np.array(theirs(Image.fromarray(patch.permute(1, 2, 0).numpy()), *parameters))
            assert np.abs(actual.permute(1, 2, 0).numpy() - expected).max() <= 1, parameters


@pytest.mark.parametrize("transform", [one for one in PILLOW if one not in COLOURFUL], ids=lambda one: one.name.lower())
def test_transform_of_one_channel_is_pillows(device, photos, transform):
    theirs, magnitudes = PILLOW[transform]
    images = photos[:1, :1]
    for parameters in magnitudes:
        ours = augmented_bytes(images, 16, 8, one_transform(images, 16, 8, transform, parameters), device)
        cut = (extract_patches(images, 16, 8) * 255).round().to(torch.uint8).flatten(0, 2)
        for patch, actual in zip(cut, ours, strict=True):
            expected = np.array(theirs(Image.fromarray(patch[0].numpy()), *parameters))
            assert np.abs(actual[0].numpy() - expected).max() <= 1, parameters


@pytest.mark.parametrize("transform", COLOURFUL, ids=lambda one: one.name.lower())
def test_colour_transforms_leave_one_channel_as_it_is(device, photos, transform):
    images = photos[:1, :1]
    ours = augmented_bytes(images, 16, 16, one_transform(images, 16, 16, transform, (0.3,)), device)
    assert torch.equal(ours, augmented_bytes(images, 16, 16, AugmentationPlan.empty(1, 2, 2), device))


def test_every_colour_turns_as_pillows(device):
    """Among them those where the exact hue is a whole number, which Pillow's arithmetic may miss."""
    levels = torch.arange(0, 256, 5)
    colours = torch.cartesian_prod(levels, levels, levels).to(torch.uint8)
    side = int(len(colours) ** 0.5) // 32 * 32
    images = colours[: side * side].T.reshape(1, 3, side, side)
    for turns in (0.0, 0.1, -0.23):
        plan = one_transform(images, 32, 32, Transform.HUE, (turns,))
        ours = augmented_bytes(images, 32, 32, plan, device)
        cut = (extract_patches(images, 32, 32) * 255).round().to(torch.uint8).flatten(0, 2)
        for patch, actual in zip(cut, ours, strict=True):
            expected = np.array(hue(Image.fromarray(patch.permute(1, 2, 0).numpy()), turns))
            assert np.abs(actual.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.13, 0.4, 1.0])
def test_sample_pairing_is_pillows_blend_with_the_partner(device, photos, share):
    images = photos[:2]
    partners = torch.randperm(18, generator=torch.Generator().manual_seed(0)).view(2, 3, 3)
    plan = one_transform(images, 16, 8, Transform.SAMPLE_PAIRING, (share,), partners=partners)
    ours = augmented_bytes(images, 16, 8, plan, device)
    cut = (extract_patches(images, 16, 8) * 255).round().to(torch.uint8).flatten(0, 2)
    pictures = [Image.fromarray(patch.permute(1, 2, 0).numpy()) for patch in cut]
    for picture, partner, actual in zip(pictures, partners.flatten().tolist(), ours, strict=True):
        expected = np.array(Image.blend(picture, pictures[partner], share))
        assert np.abs(actual.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("patch_size", [15, 24])
@pytest.mark.parametrize("reach", [0.0, 0.3, 2.4])
def test_elastic_deformation_is_pillows_mesh(device, photos, patch_size, reach):
    """Displacing the nodes of a grid is drawing each of its cells from a quadrilateral."""
    images = photos[:2]
    cells = grid(images, patch_size, 8)
    nodes = reach * (2 * torch.rand(*cells, 2, 4, 4, generator=torch.Generator().manual_seed(1)) - 1)
    plan = one_transform(images, patch_size, 8, Transform.ELASTIC, displacements=nodes)
    ours = augmented_bytes(images, patch_size, 8, plan, device)
    cut = (extract_patches(images, patch_size, 8) * 255).round().to(torch.uint8).flatten(0, 2)
    step = patch_size // 3
    compared = 0
    for patch, displacements, actual in zip(cut, nodes.flatten(0, 2), ours, strict=True):

        def corner(i, j, displacements=displacements):
            dy, dx = displacements[:, i, j].tolist()
            return j * step + dx, i * step + dy

        mesh = [
            (
                (j * step, i * step, (j + 1) * step, (i + 1) * step),
                (*corner(i, j), *corner(i + 1, j), *corner(i + 1, j + 1), *corner(i, j + 1)),
            )
            for i, j in itertools.product(range(3), repeat=2)
        ]

        def meshed(picture, mesh=mesh):
            return np.array(
                picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=0)
            )

        # Pillow fills where a place lies outside of the patch, ours repeats the edge.
        inside = meshed(Image.new("L", (patch_size, patch_size), 255)) == 255
        expected = meshed(Image.fromarray(patch.permute(1, 2, 0).numpy()))
        difference = np.abs(actual.permute(1, 2, 0).numpy() - expected).max(axis=2)
        assert difference[inside].max() <= 1
        compared += inside.mean() / len(cut)
    assert compared > 0.8


def test_tone_curve_bends_each_channel_by_its_definition(device, photos):
    images, bends = photos[:2], (0.5, -1.0, 0.07)
    ours = augmented_bytes(images, 32, 32, one_transform(images, 32, 32, Transform.TONE_CURVE, bends), device)
    x = images.double() / 255
    expected = 255 * (x + torch.tensor(bends).view(1, 3, 1, 1) * x * (1 - x))
    assert (ours - expected).abs().max() < 0.51
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for bend in (-1.0, 1.0):
        curve = augmented_bytes(ramp, 16, 16, one_transform(ramp, 16, 16, Transform.TONE_CURVE, (bend,)), device)
        assert curve.flatten().diff().min() >= 0
        assert curve.flatten()[[0, -1]].tolist() == [0, 255]


# --- The kernels do what the reference does ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 7, 16, 21])
def test_bytes_are_the_references(device, photos, channels, patch_size):
    images = photos[:, :channels]
    stride = max(patch_size, 5)
    cells = grid(images, patch_size, stride)
    plan = random_plan(cells, 4, patch_size, seed=patch_size)
    ours = augmented_bytes(images, patch_size, stride, plan, device)
    expected = (reference(images, patch_size, stride, plan) * 255).round().long().flatten(0, 2)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("transform", Transform, ids=lambda transform: transform.name.lower())
def test_bytes_of_each_transform_are_the_references(device, photos, transform):
    cells = grid(photos, 16, 8)
    codes = torch.full((*cells, 1), int(transform))
    for seed, wild in enumerate((1.0, 1.0, 50.0)):
        plan = random_plan(cells, 1, 16, seed=seed, codes=codes)
        plan = plan._replace(parameters=plan.parameters * wild, displacements=plan.displacements * wild)
        ours = augmented_bytes(photos, 16, 8, plan, device)
        assert torch.equal(ours, (reference(photos, 16, 8, plan) * 255).round().long().flatten(0, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1e9])
def test_parameters_beyond_what_a_transform_takes_are_clamped(device, photos, value):
    images = photos[:2]
    cells = grid(images, 16, 8)
    codes = torch.arange(18).view(cells)[..., None] + torch.tensor([0, 4])
    plan = random_plan(cells, 2, 16, codes=codes)
    plan = plan._replace(
        parameters=torch.full_like(plan.parameters, value), displacements=torch.full_like(plan.displacements, value)
    )
    ours = augmented_bytes(images, 16, 8, plan, device)
    assert torch.equal(ours, (reference(images, 16, 8, plan) * 255).round().long().flatten(0, 2))


@pytest.mark.parametrize("dtype", FLOATING)
def test_every_type_layout_and_window_agrees_with_the_reference(device, photos, dtype):
    images = photos[:3]
    placed = {"crop": (21, 26), "offsets": torch.tensor([[0, 6], [11, 0], [5, 3]])}
    flip = {"flip": torch.tensor([True, False, True])}
    for window, gray, patch_norm, channels_last, (patch_size, stride) in itertools.product(
        ({}, flip, placed | flip), (False, True), (False, True), (False, True), ((8, 6), (10, 11))
    ):
        height, width = window.get("crop", (32, 32))
        cells = 3, (height - patch_size) // stride + 1, (width - patch_size) // stride + 1
        plan = random_plan(cells, 2, patch_size)
        channels = 1 if gray else 3
        options = window | {
            "gray": gray,
            "mean": [0.4, 0.5, 0.45][:channels],
            "std": [0.2, 0.3, 0.25][:channels],
            "patch_norm": patch_norm,
            "channels_last": channels_last,
        }
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        actual = augment_patches(images.to(device), patch_size, stride, plan.to(device), dtype=dtype, **on_device)
        expected = reference(images, patch_size, stride, plan, **options)
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        error = (actual.cpu().double() - expected).abs() / (1 + expected.abs())
        # Flat patches amplify the rounding of their mean by the contrast's floor.
        assert error.max() <= TOLERANCE[dtype] * (10 if patch_norm else 1)
        order = (0, 1, 2, 4, 5, 3) if channels_last else (0, 1, 2, 3, 4, 5)
        assert actual.permute(order).is_contiguous()


@pytest.mark.parametrize("dtype", FLOATING)
def test_without_transforms_patches_are_those_of_extract_patches(request, device, photos, dtype):
    images, flip = photos.to(device), torch.arange(8, device=device) % 2 == 0
    cases = itertools.product(((16, 8), (5, 9)), (False, True), (False, True), (False, True), (0, 2))
    # Emulated, one in seven, of which each choice is met both ways.
    every = 7 if request.node.callspec.params["device"] == "emulated" else 1
    for (patch_size, stride), gray, patch_norm, channels_last, steps in itertools.islice(cases, 0, None, every):
        options = {
            "flip": flip,
            "gray": gray,
            "mean": [0.4] if gray else [0.4, 0.5, 0.6],
            "patch_norm": patch_norm,
            "channels_last": channels_last,
            "dtype": dtype,
        }
        cells = grid(photos, patch_size, stride)
        plan = random_plan(cells, steps, patch_size, codes=torch.zeros(*cells, steps, dtype=torch.int64)).to(device)
        actual = augment_patches(images, patch_size, stride, plan, **options)
        expected = extract_patches(images, patch_size, stride, **options)
        if patch_norm:  # On CUDA, sums over a patch may be in another order.
            torch.testing.assert_close(actual, expected, rtol=4 * TOLERANCE[dtype], atol=1e-4)
        else:
            assert torch.equal(actual, expected)


def test_without_transforms_normalised_patches_are_those_of_extract_patches_on_the_cpu(photos):
    for gray, channels_last in itertools.product((False, True), repeat=2):
        options = {"gray": gray, "channels_last": channels_last, "patch_norm": True}
        plan = AugmentationPlan.empty(8, 3, 3)
        actual = augment_patches(photos, 16, 8, plan, **options)
        assert torch.equal(actual, extract_patches(photos, 16, 8, **options))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.permute(0, 3, 2, 1),
        lambda x: x.permute(0, 3, 1, 2)[:, :, ::2, 1::3],
        lambda x: x[:1].expand(4, *x.shape[1:]).permute(0, 3, 1, 2),
        lambda x: x.permute(0, 3, 1, 2)[1:, :, 3:, 5:],
    ],
)
def test_any_strides(device, view):
    pixels = torch.randint(0, 256, (4, 30, 33, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = view(pixels)
    flip = torch.arange(len(images)) % 2 == 0
    plan = random_plan(grid(images, 8, 3), 2, 8)
    strided = AugmentationPlan(*(t.repeat_interleave(2, 0)[::2] for t in plan[:4]), FILL)
    actual = augment_patches(view(pixels.to(device)), 8, 3, strided.to(device), flip=flip.to(device))
    expected = reference(images.contiguous(), 8, 3, plan, flip=flip)
    assert (actual.cpu() - expected).abs().max() < 1e-6


def test_patches_larger_than_shared_memory(device):
    pixels = torch.randint(0, 256, (2, 3, 360, 360), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Smooth, so that deformation has something to interpolate.
    images = torch.nn.functional.avg_pool2d(pixels.float(), 9, 1, padding=4).to(torch.uint8)
    codes = torch.tensor([Transform.ROTATE, Transform.EQUALIZE, Transform.ELASTIC, Transform.CROP])
    plan = random_plan((2, 1, 1), 4, 350, codes=codes.expand(2, 1, 1, 4))
    plan = plan._replace(displacements=plan.displacements * 0.3)
    ours = augmented_bytes(images, 350, 40, plan, device)
    assert torch.equal(ours, (reference(images, 350, 40, plan) * 255).round().long().flatten(0, 2))


@pytest.mark.parametrize(
    ("channels", "patch_size"),
    [(3, side) for side in (87, 88, 89, 90, 91)] + [(1, side) for side in (151, 152, 154, 156, 157)],
)
def test_patches_around_the_shared_memory_that_a_block_has_without_asking(device, channels, patch_size):
    """48 KiB, of which the transforms' tables take 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, channels, patch_size, patch_size), dtype=torch.uint8, generator=generator)
    codes = torch.tensor([Transform.ROTATE, Transform.EQUALIZE, Transform.CONTRAST])
    plan = random_plan((2, 1, 1), 3, patch_size, codes=codes.expand(2, 1, 1, 3))
    ours = augmented_bytes(images, patch_size, 1, plan, device)
    assert torch.equal(ours, (reference(images, patch_size, 1, plan) * 255).round().long().flatten(0, 2))


def test_results_do_not_vary_with_threads(photos):
    plan = random_plan(grid(photos, 16, 8), 3, 16)

    def run(threads):
        torch.set_num_threads(threads)
        return augment_patches(photos, 16, 8, plan, patch_norm=True)

    before = torch.get_num_threads()
    try:
        first, *others = [run(threads) for threads in (1, 2, 2, 3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first, other) for other in others)


def test_an_empty_plan_does_not_depend_on_the_default_type(photos):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        plan = AugmentationPlan.empty(*grid(photos, 16, 8))
        assert torch.equal(augment_patches(photos, 16, 8, plan), extract_patches(photos, 16, 8))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("channels", [1, 3])
def test_empty_batches(device, channels):
    images = torch.empty(0, channels, 16, 16, dtype=torch.uint8, device=device)
    plan = random_plan((0, 3, 3), 2, 8).to(device)
    assert augment_patches(images, 8, 4, plan).shape == (0, 3, 3, channels, 8, 8)


def test_part_of_a_plan_is_the_plan_of_some_images(device, photos):
    plan = random_plan(grid(photos, 16, 8), 2, 16)
    plan = plan._replace(partners=plan.partners % 18 + 36)  # Of images 4 and 5.
    whole = augmented_bytes(photos, 16, 8, plan, device)
    part = augmented_bytes(photos[4:6], 16, 8, plan.narrow(4, 2), device)
    assert torch.equal(part, whole[36:54])
    others = plan.narrow(4, 3).partners  # Of 27 patches from the 36th on.
    assert torch.equal(others, (plan.partners[4:7] - 36) % 27)
    assert others.min() >= 0
    bare = plan._replace(partners=None, displacements=None).narrow(3, 2)
    assert torch.equal(bare.codes, plan.codes[3:5])
    assert bare[2:] == (None, None, FILL)
    assert plan.narrow(8, 0).partners.shape == (0, 3, 3)


# --- As a PyTorch op ---


def test_opcheck(device, photos):
    plan = random_plan((2, 3, 3), 2, 16).to(device)
    images = photos[:2].to(device)
    flip = torch.tensor([True, False], device=device)
    window = (16, 8, 32, 32)
    for options in (
        (None, flip, False, None, None, False, torch.bfloat16, False, *plan),
        (None, None, True, [0.5], [0.25], True, torch.float32, True, *plan[:2], None, None, 0),
    ):
        if options[-2] is None:
            options = (*options[:8], options[8] % 10, *options[9:])
        torch.library.opcheck(torch.ops.cpc_ext.augment_patches.default, (images, *window, *options))


def test_compiles_into_one_graph(device, photos):
    plan = random_plan(grid(photos, 16, 8), 2, 16).to(device)
    images = photos.to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images, plan):
        return augment_patches(images, 16, 8, plan, patch_norm=True, channels_last=True).relu()

    plain = augment_patches(images, 16, 8, plan, patch_norm=True, channels_last=True).relu()
    torch.testing.assert_close(step(images, plan), plain)


@pytest.mark.cuda
def test_records_into_a_cuda_graph(photos):
    plan = random_plan(grid(photos, 16, 8), 2, 16)
    images, on_device = photos.cuda(), plan.to("cuda")
    for _ in range(3):
        augment_patches(images, 16, 8, on_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        patches = augment_patches(images, 16, 8, on_device)
    images.copy_(photos.flip(0))
    graph.replay()
    torch.testing.assert_close(patches.cpu().double(), reference(photos.flip(0), 16, 8, plan))


# --- Wrong arguments ---


def right_plan() -> AugmentationPlan:
    return random_plan((2, 3, 3), 2, 16, codes=torch.full((2, 3, 3, 2), int(Transform.INVERT)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(2, 3, 32, 32)}, TypeError, "images must be uint8, got float32"),
        ({"images": torch.zeros(2, 2, 32, 32, dtype=torch.uint8)}, ValueError, "images must have 1 or 3 channels"),
        ({"images": torch.zeros(2, 3, 32, 40, dtype=torch.uint8)}, ValueError, r"plan.codes must be \[2, 3, 4, 'T'\]"),
        ({"patch_size": 33}, ValueError, "patch_size must be at most 32"),
        ({"plan": None}, TypeError, "plan must be an AugmentationPlan, got NoneType"),
        ({"plan": tuple(right_plan())}, TypeError, "plan must be an AugmentationPlan, got tuple"),
        ({"codes": right_plan().codes.long()}, TypeError, "plan.codes must be uint8, got int64"),
        ({"codes": None}, TypeError, "plan.codes must be a tensor"),
        ({"codes": right_plan().codes[..., 0]}, ValueError, "plan.codes must be"),
        ({"codes": torch.full((2, 3, 3, 2), 22, dtype=torch.uint8)}, ValueError, "plan.codes must be below 22, got 22"),
        ({"parameters": torch.zeros(2, 3, 3, 2, 2)}, ValueError, r"plan.parameters must be \[2, 3, 3, 2, 3\]"),
        ({"parameters": torch.zeros(2, 3, 3, 2, 3).double()}, TypeError, "plan.parameters must be float32"),
        ({"partners": torch.zeros(2, 3, 3)}, TypeError, "plan.partners must be int64, got float32"),
        ({"partners": torch.zeros(18, dtype=torch.int64)}, ValueError, r"plan.partners must be \[2, 3, 3\]"),
        (
            {"partners": torch.full((2, 3, 3), 18)},
            ValueError,
            r"plan.partners must be in \[0, 18\), got 18 for patch 0",
        ),
        ({"partners": torch.full((2, 3, 3), -1)}, ValueError, "got -1 for patch 0"),
        ({"displacements": torch.zeros(2, 3, 3, 2, 3, 4)}, ValueError, "plan.displacements must be"),
        ({"fill": 256}, ValueError, r"plan.fill must be in \[0, 255\], got 256"),
        ({"fill": 1.5}, TypeError, "plan.fill must be an int, got float"),
        (
            {"codes": torch.full((2, 3, 3, 2), 16, dtype=torch.uint8), "partners": None},
            ValueError,
            "plan.partners must be given",
        ),
        (
            {"codes": torch.full((2, 3, 3, 2), 17, dtype=torch.uint8), "displacements": None},
            ValueError,
            "plan.displacements must be given",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    arguments = {"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "patch_size": 16, "plan": right_plan()}
    fields = {name: value for name, value in change.items() if name in AugmentationPlan._fields}
    arguments |= {name: value for name, value in change.items() if name not in fields}
    if fields:
        arguments["plan"] = right_plan()._replace(**fields)
    with pytest.raises(error, match=words):
        augment_patches(arguments["images"], arguments["patch_size"], 8, arguments["plan"])


def test_patches_are_limited_in_size():
    images = torch.zeros(1, 1, 1100, 1100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="patch_size must be at most 1024, got 1100"):
        augment_patches(images, 1100, 1, AugmentationPlan.empty(1, 1, 1))


def test_what_no_kernel_can_look_at_is_harmless(device, request, photos):
    """Codes that mean nothing, partners that are nowhere, transforms without what they need: on devices."""
    if request.node.callspec.params["device"] == "cpu":
        pytest.skip("refused on the CPU")
    images = photos[:2].to(device)
    cells = grid(photos[:2], 16, 8)
    plain = extract_patches(images, 16, 8)
    codes = torch.tensor([22, 100, 255], dtype=torch.uint8, device=device).expand(*cells, 3)
    parameters = torch.zeros(*cells, 3, 3, device=device)
    assert torch.equal(augment_patches(images, 16, 8, AugmentationPlan(codes, parameters)), plain)
    for code in (Transform.SAMPLE_PAIRING, Transform.ELASTIC):
        lacking = AugmentationPlan(torch.full_like(codes, int(code)), parameters)
        assert torch.equal(augment_patches(images, 16, 8, lacking), plain)
    pairing = torch.full((*cells, 1), int(Transform.SAMPLE_PAIRING), dtype=torch.uint8, device=device)
    for partner, clamped in ((-5, 0), (2**62, 17)):
        partners = torch.full(cells, partner, device=device)
        patches = augment_patches(images, 16, 8, AugmentationPlan(pairing, parameters[..., :1, :] + 1, partners))
        assert torch.equal(patches.flatten(0, 2), plain.flatten(0, 2)[clamped].expand_as(plain.flatten(0, 2)))
