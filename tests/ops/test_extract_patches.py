"""extract_patches: the kernels against the reference in float64, and the reference against Pillow and plain loops."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from cpc_ext.ops import extract_patches
from cpc_ext.ops._patch_options import PatchOptions
from cpc_ext.ops.extract_patches import extract_patches_reference

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Patches are of order one: the error is that of rounding to the patches' type, or of float32 arithmetic.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_images(dtype=torch.uint8, shape=(3, 3, 33, 40), seed=0):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images if dtype == torch.uint8 else (images.double() / 255).to(dtype)


def reference(images, patch_size, stride, *, crop=None, offsets=None, flip=None, gray=False, **rest):
    """The oracle in float64."""
    in_double = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    window = *(crop or images.shape[2:]), offsets, flip
    options = PatchOptions(patch_size, stride, *window, gray, **rest | {"dtype": torch.float64})
    return extract_patches_reference(in_double, options)


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs() / (1 + expected.abs())
    assert error.max().item() <= tolerance


def on(device, values):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("out_dtype", FLOATING)
@pytest.mark.parametrize("in_dtype", [torch.uint8, *FLOATING])
def test_every_type_and_transform_agrees_with_the_reference(request, device, in_dtype, out_dtype):
    placed = {"crop": (21, 26), "offsets": torch.tensor([[0, 14], [12, 0], [5, 7]])}
    cases = itertools.product(
        ({}, {"flip": torch.tensor([True, False, True])}, placed | {"flip": torch.tensor([False, True, True])}),
        (False, True),  # gray
        (False, True),  # patch_norm
        (False, True),  # channels_last
        ((16, 8), (5, 3), (7, 9), (10, 5), (21, 1)),
    )
    # Emulated, one in seven, a number that divides none of those of the choices: each is met with each other.
    step = 7 if request.node.callspec.params["device"] == "emulated" else 1
    images = make_images(in_dtype)
    for window, gray, patch_norm, channels_last, (patch_size, stride) in itertools.islice(cases, 0, None, step):
        channels = 1 if gray else 3
        options = window | {
            "gray": gray,
            "mean": [0.4, 0.5, 0.45][:channels],
            "std": [0.2, 0.3, 0.25][:channels],
            "patch_norm": patch_norm,
            "channels_last": channels_last,
        }
        expected = reference(images, patch_size, stride, **options)
        actual = extract_patches(images.to(device), patch_size, stride, dtype=out_dtype, **on(device, options))
        assert actual.dtype == out_dtype
        assert_close(actual.cpu(), expected, TOLERANCE[out_dtype])
        memory_order = (0, 1, 2, 4, 5, 3) if channels_last else (0, 1, 2, 3, 4, 5)
        assert actual.permute(memory_order).is_contiguous()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("in_dtype", [torch.bfloat16, torch.float16])
def test_images_of_16_bits_at_any_place(device, in_dtype, out_dtype):
    # On CUDA their rows are copied in pieces of 16 or 4 bytes, or pixel by pixel, by their length; lines of a crop
    # begin within a piece.
    crop = {"crop": (18, 25), "offsets": torch.tensor([[3, 1], [0, 5]]), "flip": torch.tensor([False, True])}
    for width, layout, options in itertools.product(
        (40, 34, 33), (torch.contiguous_format, torch.channels_last), ({"mean": [0.4, 0.5, 0.45]}, crop)
    ):
        images = make_images(in_dtype, shape=(2, 3, 21, width)).contiguous(memory_format=layout)
        for patch_size, stride in ((16, 8), (7, 3)):
            actual = extract_patches(images.to(device), patch_size, stride, dtype=out_dtype, **on(device, options))
            assert_close(actual.cpu(), reference(images, patch_size, stride, **options), TOLERANCE[out_dtype])


# Layouts of images from memory in the order (image, row, column, channel).
PIECES = {
    "planar": lambda x: x.permute(0, 3, 1, 2).contiguous(),
    "interleaved": lambda x: x.permute(0, 3, 1, 2),
    "one channel": lambda x: x[:, :, :, :1].permute(0, 3, 1, 2).contiguous(),
    "a channel": lambda x: x.permute(0, 3, 1, 2).contiguous()[:, 1:2],
    "a part": lambda x: x.permute(0, 3, 1, 2).contiguous()[1:, :, 2:, 8:],
    "off by one": lambda x: x.permute(0, 3, 1, 2).contiguous()[:, :, :, 1:],
    "one for all": lambda x: x[:1].expand_as(x).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("view", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("dtype", FLOATING)
def test_patches_that_are_pieces_of_images_have_their_bits(device, dtype, view):
    # On CUDA they are copied 16 or 8 bytes at a time, where all is aligned.
    pixels = torch.randn(3, 34, 48, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    pixels.view(-1)[::7], pixels.view(-1)[3::11] = torch.inf, torch.nan
    images = view(pixels)
    for (patch_size, stride), crop, channels_last in itertools.product(
        ((16, 8), (4, 4), (8, 12), (6, 2), (5, 3)), (None, (24, 28), (24, 27)), (False, True)
    ):
        options = {"crop": crop, "channels_last": channels_last, "dtype": dtype}
        actual = extract_patches(view(pixels.to(device)), patch_size, stride, **options).cpu()
        height, width = crop or images.shape[2:]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        window = images[:, :, top : top + height, left : left + width]
        expected = window.unfold(2, patch_size, stride).unfold(3, patch_size, stride).permute(0, 2, 3, 1, 4, 5)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=False)
        memory_order = (0, 1, 2, 4, 5, 3) if channels_last else (0, 1, 2, 3, 4, 5)
        assert actual.permute(memory_order).is_contiguous()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(device, channels):
    for channels_last, patch_norm, layout in itertools.product(
        (False, True), (False, True), (torch.contiguous_format, torch.channels_last)
    ):
        images = make_images(shape=(2, channels, 18, 20)).contiguous(memory_format=layout)
        options = {"channels_last": channels_last, "patch_norm": patch_norm, "flip": torch.tensor([False, True])}
        assert_close(
            extract_patches(images.to(device), 6, 4, **on(device, options)).cpu(),
            reference(images, 6, 4, **options),
            4e-6,
        )


@pytest.mark.parametrize("in_dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_patches_of_many_rows(device, in_dtype):
    # More than the share of shared memory that a block prefers: on CUDA some rows at a time, the last of them fewer, or
    # with patch_norm some patches.
    images = make_images(in_dtype, shape=(1, 3, 68, 88))
    for patch_size, channels_last, patch_norm in ((60, False, False), (67, True, False), (44, False, True)):
        options = {"channels_last": channels_last, "patch_norm": patch_norm, "flip": torch.tensor([True])}
        actual = extract_patches(images.to(device), patch_size, 11, dtype=torch.float32, **on(device, options))
        assert_close(actual.cpu(), reference(images, patch_size, 11, **options), 1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 3, 1, 2),  # Images as files hold them.
        lambda x: x.permute(0, 3, 2, 1),  # Column-major, as STL-10's.
        lambda x: x.permute(0, 3, 1, 2)[:, :, ::2, 1::3],
        lambda x: x[:1].expand(4, *x.shape[1:]).permute(0, 3, 1, 2),
        lambda x: x.permute(0, 3, 1, 2)[1:, :, 3:, 5:],
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_strides(device, view, dtype):
    images = view(make_images(dtype, shape=(4, 30, 33, 3)))
    flip = torch.arange(len(images)) % 2 == 0
    for gray in (False, True):
        actual = extract_patches(
            view(make_images(dtype, shape=(4, 30, 33, 3)).to(device)), 8, 3, flip=flip.to(device), gray=gray
        )
        assert_close(actual.cpu(), reference(images, 8, 3, flip=flip, gray=gray), 4e-6)


@pytest.mark.parametrize("patch_norm", [False, True])
@pytest.mark.parametrize("stride", [2**31, 2**32, 2**63 - 1])
def test_a_stride_beyond_the_image_leaves_one_patch(device, stride, patch_norm):
    results = []
    for given in (stride, 12):
        images = make_images(torch.float32, shape=(2, 3, 12, 13)).to(device).requires_grad_()
        patches = extract_patches(images, 5, given, patch_norm=patch_norm)
        weights = torch.linspace(-1, 1, patches.numel(), device=device).view_as(patches)
        results.append((patches, *torch.autograd.grad(patches, images, weights)))
    assert results[0][0].shape == (2, 1, 1, 3, 5, 5)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_grid_is_where_the_definition_says():
    images = torch.arange(2 * 1 * 7 * 9, dtype=torch.float64).reshape(2, 1, 7, 9)
    patches = extract_patches(images, 3, 2)
    assert patches.shape == (2, 3, 4, 1, 3, 3)
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        torch.testing.assert_close(patches[b, r, c], images[b, :, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3], rtol=0, atol=0)


def test_crops_are_centred_unless_placed_and_mirrored_inside_their_window():
    images = make_images(torch.float64, shape=(2, 1, 11, 13))
    centred = extract_patches(images, 5, 5, crop=(5, 5))
    torch.testing.assert_close(centred[:, 0, 0], images[:, :, 3:8, 4:9])
    offsets = torch.tensor([[6, 8], [0, 0]], dtype=torch.int32)
    placed = extract_patches(images, 5, 5, crop=(5, 5), offsets=offsets, flip=torch.tensor([True, False]))
    torch.testing.assert_close(placed[0, 0, 0], images[0, :, 6:, 8:].flip(-1))
    torch.testing.assert_close(placed[1, 0, 0], images[1, :, :5, :5])


def test_gray_is_pillows():
    pixels = make_images(shape=(1, 3, 16, 16))
    pillow = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).convert("L")
    ours = extract_patches(pixels, 16, 16, gray=True)[0, 0, 0, 0] * 255
    # Pillow rounds to whole levels.
    assert np.abs(ours.numpy() - np.asarray(pillow, dtype=np.float32)).max() <= 0.51


def test_patch_norm_gives_each_patch_its_own_mean_and_contrast():
    images = make_images(torch.float64)
    patches = extract_patches(images, 8, 8, patch_norm=True)
    plain = extract_patches(images, 8, 8)
    torch.testing.assert_close(patches.mean((3, 4, 5)), torch.zeros(3, 4, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    sigma = plain.std((3, 4, 5), correction=0)
    torch.testing.assert_close(patches.std((3, 4, 5), correction=0), sigma / (sigma + 0.1))
    # A flat patch, whatever its level, is zero and not amplified noise.
    assert extract_patches(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), 8, 8, patch_norm=True).abs().max() < 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch_norm", [False, True])
@pytest.mark.parametrize("gray", [False, True])
def test_gradcheck(request, device, gray, patch_norm, channels_last):
    images = make_images(torch.float64, shape=(2, 3, 7, 8)).to(device).requires_grad_()
    options = {
        "crop": (6, 7),
        "offsets": torch.tensor([[0, 1], [1, 0]], device=device),
        "flip": torch.tensor([True, False], device=device),
        "std": [0.5] if gray else [0.5, 0.7, 0.9],
        "gray": gray,
        "patch_norm": patch_norm,
        "channels_last": channels_last,
    }
    # Emulated, one random direction instead of every pixel, each of which is two launches.
    fast = request.node.callspec.params["device"] == "emulated"
    assert torch.autograd.gradcheck(lambda x: extract_patches(x, 3, 2, **options), images, fast_mode=fast)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("patch_norm", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_agree_with_the_references_in_float64(device, dtype, patch_norm, channels_last):
    images = make_images(dtype, shape=(3, 3, 33, 40))
    options = {"flip": torch.tensor([True, False, True]), "patch_norm": patch_norm, "channels_last": channels_last}
    ours = images.clone().to(device).requires_grad_()
    exact = images.double().requires_grad_()
    patches = extract_patches(
        ours, 16, 8, dtype=torch.float32 if dtype != torch.float64 else dtype, **on(device, options)
    )
    expected = reference(exact, 16, 8, **options)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    patches.backward(weights.to(device, patches.dtype))
    expected.backward(weights.double())
    assert ours.grad.dtype == dtype
    # Relative to the largest, since sums of four patches may cancel.
    scale = exact.grad.abs().max()
    assert_close(ours.grad.cpu().double() / scale, exact.grad / scale, TOLERANCE[dtype])


def test_a_flat_patch_has_a_finite_gradient(device):
    images = torch.full((1, 1, 8, 8), 0.5, device=device, requires_grad=True)
    weights = torch.randn(1, 1, 1, 1, 8, 8, device=device)
    extract_patches(images, 8, 8, patch_norm=True).backward(weights)
    torch.testing.assert_close(images.grad[0, 0], (weights - weights.mean())[0, 0, 0, 0] / 0.1)


def test_results_do_not_vary_between_runs_nor_with_threads():
    images = make_images(torch.float32, shape=(5, 3, 50, 61)).requires_grad_()

    def run(threads):
        torch.set_num_threads(threads)
        patches = extract_patches(images, 9, 4, patch_norm=True)
        (gradient,) = torch.autograd.grad(patches, images, torch.ones_like(patches) * patches.detach())
        return patches.detach(), gradient

    before = torch.get_num_threads()
    try:
        first, *others = [run(threads) for threads in (1, 2, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (0, 1, 8, 8)])
def test_empty_batches(device, shape):
    images = torch.empty(shape, device=device, requires_grad=True)
    patches = extract_patches(images, 8, 4, offsets=torch.empty(0, 2, dtype=torch.int64, device=device), crop=(8, 8))
    assert patches.shape == (0, 1, 1, shape[1], 8, 8)
    patches.sum().backward()
    assert images.grad.shape == shape


def test_opcheck(device):
    options = (None, None, True, [0.5], [0.25], True, torch.float32, True)
    floating = make_images(torch.float32, shape=(2, 3, 12, 12)).to(device).requires_grad_()
    offsets, flip = torch.tensor([[0, 1], [2, 2]], device=device), torch.tensor([True, False], device=device)
    torch.library.opcheck(torch.ops.cpc_ext.extract_patches.default, (floating, 4, 2, 12, 12, *options))
    torch.library.opcheck(
        torch.ops.cpc_ext.extract_patches.default,
        (
            make_images(shape=(2, 3, 12, 12)).to(device),
            4,
            2,
            10,
            10,
            offsets,
            flip,
            False,
            None,
            None,
            False,
            torch.bfloat16,
            False,
        ),
    )


def test_compiles_into_one_graph(device):
    images = make_images(torch.float32).to(device).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return extract_patches(x * 2, 8, 4, crop=(32, 32), patch_norm=True, channels_last=True).relu()

    plain = extract_patches(images * 2, 8, 4, crop=(32, 32), patch_norm=True, channels_last=True).relu()
    torch.testing.assert_close(step(images), plain)
    (expected,) = torch.autograd.grad(plain.square().sum(), images)
    (actual,) = torch.autograd.grad(step(images).square().sum(), images)
    torch.testing.assert_close(actual, expected)


@pytest.mark.cuda
def test_records_into_a_cuda_graph():
    images = make_images().cuda()
    for _ in range(3):
        extract_patches(images, 8, 4, patch_norm=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        patches = extract_patches(images, 8, 4, patch_norm=True)
    images.copy_(make_images(seed=1))
    graph.replay()
    assert_close(patches.cpu(), reference(make_images(seed=1), 8, 4, patch_norm=True), 2e-6)


@pytest.mark.cuda
def test_large_patches_and_outputs_on_cuda():
    images = make_images(shape=(1, 3, 300, 310))
    # 300 x 300 x 3 floats do not fit shared memory.
    for patch_size in (80, 300):
        for patch_norm in (False, True):
            actual = extract_patches(images.cuda(), patch_size, 4, patch_norm=patch_norm)
            assert_close(actual.cpu(), reference(images, patch_size, 4, patch_norm=patch_norm), 1e-5)
    # More than 2^31 values.
    one = make_images(shape=(1, 1, 64, 64)).cuda()
    for many in (one.expand(180_000, 1, 64, 64), one.half().expand(180_000, 1, 64, 64)):
        patches = extract_patches(many, 16, 8, dtype=torch.float16)
        assert patches.numel() > 2**31
        torch.testing.assert_close(patches[-1], patches[0])


def test_large_results_are_written_past_the_cache_alike():
    images = make_images(shape=(64, 3, 64, 64))
    many = images.repeat(8, 1, 1, 1)
    for channels_last, patch_norm, dtype in itertools.product(
        (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        options = {"channels_last": channels_last, "patch_norm": patch_norm, "dtype": dtype}
        large = extract_patches(many, 16, 8, **options)
        assert large.numel() * large.element_size() > 32 << 20  # kStreamBytes in csrc/patches/cpu.cpp
        assert torch.equal(large[-64:], extract_patches(images, 16, 8, **options))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": np.zeros((2, 3, 16, 16))}, TypeError, "images must be a tensor"),
        ({"images": torch.zeros(3, 16, 16)}, ValueError, r"images must be \[B, C, H, W\]"),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.int32)}, TypeError, "int32"),
        ({"images": torch.zeros(2, 0, 16, 16)}, ValueError, "at least one channel"),
        (
            {"images": torch.zeros(2, 16, 18, 3)},
            ValueError,
            r"at most 3 .*; images must be \[B, C, H, W\], .* \[B, H, W, C\]",
        ),
        ({"images": torch.zeros(2, 16, 18, 3), "crop": (8, 8)}, ValueError, r"crop must .* \[B, H, W, C\]$"),
        ({"images": torch.zeros(2, 16, 18, 1), "gray": True, "patch_size": 1}, ValueError, r"gray .* \[B, H, W, C\]$"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"patch_size": 17}, ValueError, "patch_size must be at most 16"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"crop": (8,)}, ValueError, r"crop must be \(h, w\)"),
        ({"crop": (20, 8)}, ValueError, "crop must lie within"),
        ({"crop": (3, 8)}, ValueError, "patch_size must be at most 3"),
        ({"offsets": torch.zeros(2, 2, dtype=torch.long)}, ValueError, "give crop"),
        ({"crop": (8, 8), "offsets": torch.zeros(3, 2, dtype=torch.long)}, ValueError, "offsets must be"),
        ({"crop": (8, 8), "offsets": torch.zeros(2, 2)}, TypeError, "offsets must be integers"),
        ({"crop": (8, 8), "offsets": torch.tensor([[0, 0], [0, 9]])}, ValueError, "got 9 for x of image 1"),
        ({"crop": (8, 8), "offsets": torch.tensor([[-1, 0], [0, 8]])}, ValueError, "got -1 for y of image 0"),
        ({"flip": torch.zeros(2)}, TypeError, "flip must be bool"),
        ({"flip": torch.zeros(1, dtype=torch.bool)}, ValueError, "flip must be"),
        ({"flip": [True, False]}, TypeError, "flip must be a tensor"),
        ({"images": torch.zeros(2, 2, 16, 16), "gray": True}, ValueError, "gray needs"),
        ({"mean": [0.5]}, ValueError, "mean must have one value for each of 3"),
        ({"std": [1.0, 0.0, 1.0]}, ValueError, "std must be positive"),
        ({"std": [1.0, float("nan"), 1.0]}, ValueError, "std must be positive"),
        ({"dtype": torch.int64}, TypeError, "dtype must be one of"),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    arguments = {"images": torch.zeros(2, 3, 16, 16), "patch_size": 4, "stride": 2} | change
    images, patch_size, stride = (arguments.pop(name) for name in ("images", "patch_size", "stride"))
    with pytest.raises(error, match=words):
        extract_patches(images, patch_size, stride, **arguments)
