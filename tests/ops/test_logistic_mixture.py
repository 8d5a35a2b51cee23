"""The mixture of logistics: kernels against the reference in float64, the reference against its definition, samples."""

import itertools
import os

import pytest
import torch

from cpc_ext.ops import logistic_mixture_nll, sample_logistic_mixture
from cpc_ext.ops.logistic_mixture import (
    logistic_mixture_nll_reference,
    sample_logistic_mixture_reference,
)

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Errors of gradients, as a share of the largest: the rounding to their type, or that of float32 arithmetic.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
# CUDA's __expf gives the inverse of a scale, up to e^7, with an error of up to 10 units in the last place. That times a
# distance of some hundred scales is an exponent.
FAST_EXPONENTIALS = {torch.float32: 1e-4}
# Errors in nats: the arithmetic is the same for all types but float64.
NATS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def make_images(channels=3, batch=2, size=(5, 7), seed=0):
    """Return random images in which a third of the values are 0 and a third 255."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, channels, *size
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    kind = torch.randint(0, 3, shape, generator=generator)
    return images.masked_fill(kind == 0, 0).masked_fill(kind == 1, 255)


def make_params(channels=3, components=4, batch=2, size=(5, 7), dtype=torch.float32, seed=0):
    """Return parameters of narrow and wide components, near and far from the values, for bins of all masses."""
    generator = torch.Generator().manual_seed(seed)
    count = components * (10 if channels == 3 else 3)
    params = torch.randn(batch, count, *size, generator=generator)
    spread = 10.0 ** torch.randint(-1, 2, (batch, count, *size), generator=generator) / 2
    return (params * spread).to(dtype)


def run(images, params, weights):
    """Nats and the gradient in params of their weighted sum."""
    params = params.detach().requires_grad_()
    nll = logistic_mixture_nll(images, params)
    (gradient,) = torch.autograd.grad(nll, params, weights.to(nll))
    return nll.detach().cpu().double(), gradient


def reference(images, params, weights):
    params = params.detach().double().requires_grad_()
    nll = logistic_mixture_nll_reference(images, params)
    (gradient,) = torch.autograd.grad(nll, params, weights.double())
    return nll.detach(), gradient


def assert_agrees(device, images, params, dtype, view=lambda x: x):
    weights = torch.linspace(0.5, 2, len(view(images)))
    nll, gradient = run(view(images.to(device)), view(params.to(device)), weights.to(device))
    exact_nll, exact_gradient = reference(view(images), view(params), weights)
    assert gradient.dtype == dtype
    torch.testing.assert_close(nll, exact_nll, rtol=NATS[dtype], atol=NATS[dtype])
    error = (gradient.cpu().double() - exact_gradient).abs().max()
    fast = device.type == "cuda" or os.environ.get("CPC_EMULATION_MATH") == "gpu"
    tolerance = TOLERANCE | (FAST_EXPONENTIALS if fast else {})
    assert error <= tolerance[dtype] * exact_gradient.abs().max()
    return gradient


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_type_and_layout_agrees_with_the_reference(device, channels, dtype):
    for components, size in itertools.product((1, 2, 5, 10), ((5, 7), (12, 12))):
        images = make_images(channels, size=size)
        params = make_params(channels, components, size=size, dtype=dtype)
        gradient = assert_agrees(device, images, params, dtype)
        assert gradient.is_contiguous()
        params = params.to(memory_format=torch.channels_last)
        gradient = assert_agrees(device, images, params, dtype)
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :, 1:],
        lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        lambda x: x[:1].expand(3, *x.shape[1:]),
        lambda x: x[..., :1],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(device, view, dtype):
    for channels in (1, 3):
        assert_agrees(device, make_images(channels), make_params(channels, 2, dtype=dtype), dtype, view)


def test_more_components_than_shared_memory_holds(device):
    params = make_params(components=40, size=(3, 3)).to(memory_format=torch.channels_last)
    assert_agrees(device, make_images(size=(3, 3)), params, torch.float32)


def one_channel(value, logits=(0.0,), means=(0.0,), log_scales=(0.0,)):
    """An image of one pixel and float32 parameters that float64 holds as well."""
    params = torch.tensor([*logits, *means, *log_scales]).view(1, -1, 1, 1)
    return torch.tensor([[[[value]]]], dtype=torch.uint8), params


def test_extreme_parameters(device):
    """Far means, narrow and wide scales, at all values: right, and their gradients finite."""
    cases = itertools.product(
        (0, 1, 127, 254, 255), (-1e4, -3.0, -1.0, 0.5, 1.0, 1e4), (-1e4, -7.5, -7.0, 0.0, 50, 1e4)
    )
    problems = [one_channel(value, means=(mean,), log_scales=(scale,)) for value, mean, scale in cases]
    images, params = (torch.cat(tensors) for tensors in zip(*problems, strict=True))
    weights = torch.ones(len(images))
    nll, gradient = run(images.to(device), params.to(device), weights.to(device))
    exact_nll, exact_gradient = reference(images, params, weights)
    # The distance of a value from the mean is rounded to float32, 1100 times as large in scales.
    torch.testing.assert_close(nll, exact_nll, rtol=2e-6, atol=1e-4)
    torch.testing.assert_close(gradient.cpu().double(), exact_gradient, rtol=1e-4, atol=2e-4)


def test_unlikely_components_do_not_matter(device):
    """Logits and means however far leave the gradient of the rest as it is."""
    for shift in (0.0, 1e4, -1e4):
        logits = torch.tensor([0.0, -1e4, 3.0]) + shift
        images, params = one_channel(90, logits, means=(0.1, 0.0, 1e4), log_scales=(-2.0, -2.0, -7.0))
        nll, gradient = run(images.to(device), params.to(device), torch.ones(1, device=device))
        exact_nll, exact_gradient = reference(images, params, torch.ones(1))
        torch.testing.assert_close(nll, exact_nll, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.cpu().double(), exact_gradient, rtol=1e-5, atol=1e-6)


def test_enormous_parameters_give_finite_results(device):
    generator = torch.Generator().manual_seed(0)
    enormous = torch.tensor([0.0, -7.0, 20.0, 88.0, -88.0, 1e4, -1e4, 1e30, -1e30])
    for channels in (1, 3):
        images = make_images(channels, batch=4, size=(8, 8))
        count = 2 * (10 if channels == 3 else 3)
        params = enormous[torch.randint(len(enormous), (4, count, 8, 8), generator=generator)]
        nll, gradient = run(images.to(device), params.to(device), torch.ones(4, device=device))
        exact_nll, _ = reference(images, params, torch.ones(4))
        torch.testing.assert_close(nll, exact_nll, rtol=1e-5, atol=0)
        assert gradient.isfinite().all()


def test_parameters_that_are_no_numbers_show(device):
    images, params = make_images(), make_params()
    params[1, 7, 2, 3] = torch.nan
    nll = logistic_mixture_nll(images.to(device), params.to(device))
    assert nll.isnan().tolist() == [False, True]


@pytest.mark.parametrize("gone", [[0], [2], [0, 1], [1, 2]], ids=str)
def test_components_of_no_weight_are_absent(device, gone):
    """Logits of -inf, also the first."""
    images, params = make_images(), make_params(components=3)
    params[:, gone] = -torch.inf
    nll, gradient = run(images.to(device), params.to(device), torch.ones(2, device=device))
    exact_nll, exact_gradient = reference(images, params, torch.ones(2))
    assert exact_nll.isfinite().all()
    torch.testing.assert_close(nll, exact_nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.cpu().double(), exact_gradient, rtol=1e-3, atol=1e-3)


def test_components_that_are_all_too_far_away_are_not_finite(device):
    images, params = make_images(1), make_params(1)
    params[1, 4:8, 2, 3] = torch.inf  # The means at a pixel.
    nll = logistic_mixture_nll(images.to(device), params.to(device))
    assert nll.isfinite().tolist() == [True, False]


def test_log_scales_are_cut_off_at_minus_seven(device):
    images, params = one_channel(128, log_scales=(-7.0,))
    below = params.clone()
    below[:, 2] = -7.25
    nll, gradient = run(images.to(device), params.to(device), torch.ones(1, device=device))
    nll_below, gradient_below = run(images.to(device), below.to(device), torch.ones(1, device=device))
    assert nll == nll_below
    assert gradient[0, 2] != 0
    assert gradient_below[0, 2] == 0
    assert torch.equal(gradient[:, :2], gradient_below[:, :2])


def test_single_masses_are_exact_to_float32(device):
    """One component: the nats are the logarithm of one mass, over all that it can be."""
    means, scales = torch.linspace(-2, 2, 41), torch.linspace(-6.9, 3, 34)
    params = torch.stack([*torch.meshgrid(means, scales, indexing="ij")]).view(1, 2, 41, 34)
    params = torch.cat([torch.zeros(1, 1, 41, 34), params], 1).transpose(0, 2)  # A pixel an image of 34 columns.
    for value in (0, 1, 100, 254, 255):
        images = torch.full((41, 1, 1, 34), value, dtype=torch.uint8)
        for column in range(0, 34, 11):
            chosen = params[..., column : column + 1]
            actual = logistic_mixture_nll(images[..., :1].to(device), chosen.to(device))
            expected = logistic_mixture_nll_reference(images[..., :1], chosen.double())
            # Distances from the mean are of order one and exact to 1e-7; scales multiply them.
            bound = 2e-6 * expected + 3e-7 * (1 + chosen[:, 2, 0, 0].neg().exp())
            assert bool(((actual.cpu().double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_gradcheck(device, channels):
    images = make_images(channels, size=(2, 2)).to(device)
    params = make_params(channels, 2, size=(2, 2), dtype=torch.float64).to(device).clamp(-3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: logistic_mixture_nll(images, x), params)


def test_masses_of_all_values_add_up_to_one():
    """Up to where the density stands for a bin's mass."""
    params = make_params(1, 4, batch=1, size=(1, 1), dtype=torch.float64).expand(256, -1, 1, 1)
    values = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    total = torch.exp(-logistic_mixture_nll_reference(values, params)).sum()
    assert total.item() == pytest.approx(1, abs=2e-3)


def test_colors_see_those_before_them():
    """Green by coefficient 0 times red, blue by coefficient 1 times red and coefficient 2 times green."""
    image = torch.tensor([20, 140, 250], dtype=torch.uint8).view(1, 3, 1, 1)
    params = make_params(3, 1, batch=1, size=(1, 1), dtype=torch.float64)
    _, *colors = params.flatten().split([1, 3, 3, 3])
    red, green, _ = (image.flatten().double() / 127.5 - 1).tolist()
    c0, c1, c2 = torch.stack([color[2] for color in colors]).tanh().tolist()
    expected = 0.0
    for c, shift in enumerate((0.0, c0 * red, c1 * red + c2 * green)):
        alone = torch.stack([torch.zeros(()), colors[c][0] + shift, colors[c][1]]).view(1, 3, 1, 1)
        expected += logistic_mixture_nll_reference(image[:, c : c + 1], alone)
    torch.testing.assert_close(logistic_mixture_nll_reference(image, params), expected)


def test_results_do_not_vary_between_runs_nor_with_threads():
    # Large enough for three threads.
    images = make_images(batch=3, size=(40, 11))
    params = make_params(batch=3, size=(40, 11)).to(memory_format=torch.channels_last)

    def with_threads(threads):
        torch.set_num_threads(threads)
        return run(images, params, torch.ones(3))

    before = torch.get_num_threads()
    try:
        first, *others = [with_threads(threads) for threads in (1, 2, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 1, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_do(device, shape, dtype):
    batch, channels, *size = shape
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    params = torch.zeros(batch, 30, *size, device=device, dtype=dtype, requires_grad=True)
    nll = logistic_mixture_nll(images, params)
    assert nll.tolist() == [0.0] * batch
    nll.sum().backward()
    assert params.grad.shape == params.shape
    assert sample_logistic_mixture(params, channels=channels).shape == shape


def test_opcheck(device):
    images = make_images(size=(2, 3)).to(device)
    params = make_params(size=(2, 3)).to(device, memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.cpc_ext.logistic_mixture_nll.default, (images, params.requires_grad_(), True))
    noise = torch.rand(2, 7, 2, 3, device=device)
    torch.library.opcheck(torch.ops.cpc_ext.sample_logistic_mixture.default, (params.detach(), noise, 3, 0.5))


def test_compiles_into_one_graph():
    images, params = make_images(), make_params().requires_grad_()

    def loss(images, params):
        return (logistic_mixture_nll(images, params * 2) / 3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = loss(images, params)
    torch.testing.assert_close(compiled(images, params), plain)
    for one, other in zip(
        torch.autograd.grad(compiled(images, params), params), torch.autograd.grad(plain, params), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_autocast(device):
    """Parameters of half precision come from layers under autocast; nats are float32 all the same."""
    images, params = make_images().to(device), make_params(dtype=torch.bfloat16).to(device)
    expected = logistic_mixture_nll(images, params)
    with torch.autocast(device.type, torch.bfloat16):
        nll = logistic_mixture_nll(images, params)
    assert nll.dtype == torch.float32
    assert torch.equal(nll, expected)


def test_no_gradient_is_kept_unless_asked_for():
    images, params = make_images(), make_params().requires_grad_()
    with torch.no_grad():
        assert not logistic_mixture_nll(images, params).requires_grad
    nll = logistic_mixture_nll(images, params)
    (first,) = torch.autograd.grad(nll.sum(), params, retain_graph=True)
    (second,) = torch.autograd.grad(nll.sum(), params)
    assert torch.equal(first, second)


def test_second_derivatives_are_refused():
    images, params = make_images(), make_params().requires_grad_()
    loss = logistic_mixture_nll(images, params).square().sum()
    (gradient,) = torch.autograd.grad(loss, params, create_graph=True)
    with pytest.raises(RuntimeError, match="logistic_mixture_nll has no second derivatives"):
        gradient.sum().backward()


# --- Samples ---


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_noise_gives_the_references_samples(device, channels, dtype):
    noise = torch.rand(2, 4 + channels, 5, 7, generator=torch.Generator().manual_seed(1))
    noise[0, :, 0, :2] = torch.tensor([0.0, 1.0])
    params = make_params(channels, dtype=dtype)
    for temperature, noise_dtype in itertools.product((0, 0.5, 1.0), (torch.float32, torch.float64)):
        expected = sample_logistic_mixture_reference(params, noise.to(noise_dtype), channels, temperature)
        for laid_out in (
            params,
            params.to(memory_format=torch.channels_last),
            params.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            images = sample_logistic_mixture(
                laid_out.to(device),
                channels=channels,
                noise=noise.to(device, noise_dtype),
                temperature=temperature,
            )
            assert images.dtype == torch.uint8
            assert torch.equal(images.cpu(), expected)


def test_pixels_are_sampled_alike_one_at_a_time(device):
    params, noise = make_params().to(device), torch.rand(2, 7, 5, 7).to(device)
    together = sample_logistic_mixture(params, noise=noise)
    for row, col in ((0, 0), (4, 6), (2, 3)):
        window = (..., slice(row, row + 1), slice(col, col + 1))
        assert torch.equal(sample_logistic_mixture(params[window], noise=noise[window]), together[window])


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_follow_the_likelihood(channels):
    count = 40_000
    params = make_params(channels, 2, batch=1, size=(1, 1), dtype=torch.float64, seed=3).clamp(-2.5, 1)
    generator = torch.Generator().manual_seed(0)
    images = sample_logistic_mixture(params.expand(count, -1, 1, 1), generator, channels=channels)
    # The mean of the nats is the entropy, whose exact value for one channel is a sum over its values.
    nll = logistic_mixture_nll(images, params.expand(count, -1, 1, 1))
    if channels == 1:
        values = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
        probabilities = torch.exp(-logistic_mixture_nll(values, params.expand(256, -1, 1, 1)))
        frequencies = torch.bincount(images.flatten().long(), minlength=256) / count
        deviation = (probabilities / count).sqrt()
        assert bool(((frequencies - probabilities).abs() < 5 * deviation + 2e-4).all())
    else:
        # Importance weights against uniform values average to one where the samples' likelihood is what it says.
        seen = images.flatten(1).unique(dim=0, return_counts=True)
        often = seen[1] > 20
        values = seen[0][often].view(-1, 3, 1, 1)
        probabilities = torch.exp(-logistic_mixture_nll(values, params.expand(len(values), -1, 1, 1)))
        frequencies = seen[1][often] / count
        assert len(values) > 0
        assert bool(((frequencies - probabilities).abs() < 6 * (probabilities / count).sqrt() + 2e-4).all())
    assert nll.isfinite().all()


def test_cold_samples_are_the_likeliest_components_means():
    params = torch.zeros(1, 6, 1, 1)
    params[:, :2, 0, 0] = torch.tensor([0.0, 1.0])
    params[:, 2:4, 0, 0] = torch.tensor([-0.5, 0.5])
    assert sample_logistic_mixture(params, channels=1, temperature=0).item() == round(1.5 * 127.5)


def test_generators_repeat_samples(device):
    params = make_params().to(device)
    first, second = (sample_logistic_mixture(params, torch.Generator(device).manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_logistic_mixture(params, torch.Generator(device).manual_seed(6)))


@pytest.mark.parametrize("dtype", FLOATING)
def test_samples_do_not_depend_on_the_default_type(dtype):
    params = make_params()
    expected = sample_logistic_mixture(params, torch.Generator().manual_seed(5))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(sample_logistic_mixture(params, torch.Generator().manual_seed(5)), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.cuda
def test_more_than_two_to_the_31_parameters_on_cuda():
    images, params = make_images(batch=1, size=(64, 64)).cuda(), make_params(3, 10, 1, (64, 64)).cuda()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        many = params.bfloat16().expand(5300, -1, -1, -1).contiguous(memory_format=memory_format).requires_grad_()
        assert many.numel() > 2**31
        nll = logistic_mixture_nll(images.expand(5300, -1, -1, -1), many)
        (gradient,) = torch.autograd.grad(nll.sum(), many)
        assert nll[0] == nll[-1]
        assert torch.equal(gradient[0], gradient[-1])


IMAGES, PARAMS = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, 20, 4, 5)


@pytest.mark.parametrize(
    ("images", "params", "error", "message"),
    [
        ([1], PARAMS, TypeError, "images must be a tensor, got list"),
        (IMAGES.float(), PARAMS, TypeError, "images must be uint8, got float32"),
        (
            IMAGES[:, :2],
            PARAMS,
            ValueError,
            r"images must be \[B, 1, H, W\] or \[B, 3, H, W\], got shape \(2, 2, 4, 5\)",
        ),
        (IMAGES[0], PARAMS, ValueError, r"images must be .* got shape \(3, 4, 5\)"),
        (IMAGES, 1.0, TypeError, "params must be a tensor, got float"),
        (IMAGES, PARAMS.long(), TypeError, "params must be one of float32, .* got int64"),
        (IMAGES, PARAMS.to_sparse(), TypeError, "params must be a dense tensor, got layout torch.sparse_coo"),
        (IMAGES, PARAMS[0], ValueError, r"params must be \[B, P, H, W\], got shape \(20, 4, 5\)"),
        (IMAGES, PARAMS[:, :12], ValueError, r"params must be \[B, 10 K, H, W\] for K components and 3 channels"),
        (IMAGES, PARAMS[:, :0], ValueError, r"params must be \[B, 10 K, H, W\]"),
        (IMAGES[:, :1], PARAMS, ValueError, r"params must be \[B, 3 K, H, W\] for K components and 1 channel, got"),
        (IMAGES[:1], PARAMS, ValueError, r"params must be \[1, P, 4, 5\] for images \(1, 3, 4, 5\)"),
        (IMAGES, PARAMS[..., :4], ValueError, r"params must be \[2, P, 4, 5\]"),
        (IMAGES, PARAMS.to("meta"), ValueError, "params must be on cpu like the images, got meta"),
    ],
)
def test_wrong_arguments(images, params, error, message):
    with pytest.raises(error, match=message):
        logistic_mixture_nll(images, params)


NOISE = torch.zeros(2, 5, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": [0.0]}, TypeError, "params must be a tensor, got list"),
        ({"params": PARAMS[:, :3]}, ValueError, r"params must be \[B, 10 K, H, W\]"),
        ({"channels": 2}, ValueError, "channels must be 1 or 3, got 2"),
        ({"channels": 3.0}, TypeError, "channels must be an int, got float"),
        ({"noise": 0.5}, TypeError, "noise must be a tensor, got float"),
        ({"noise": NOISE.bfloat16()}, TypeError, "noise must be float32 or float64, got bfloat16"),
        (
            {"noise": NOISE[:, :4]},
            ValueError,
            r"noise must be \[2, 5, 4, 5\] for these params, got shape \(2, 4, 4, 5\)",
        ),
        ({"noise": NOISE.to("meta")}, ValueError, "noise must be on cpu like the params, got meta"),
        ({"noise": NOISE, "generator": torch.Generator()}, ValueError, "either a generator or noise"),
        ({"temperature": -1}, ValueError, "temperature must be finite and not negative, got -1"),
        ({"temperature": torch.inf}, ValueError, "temperature must be finite"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ],
)
def test_wrong_arguments_of_sampling(change, error, message):
    with pytest.raises(error, match=message):
        sample_logistic_mixture(**{"params": PARAMS, **change})
