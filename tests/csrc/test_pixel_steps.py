"""The kernel that runs a network pixel by pixel: its arithmetic, its independence of threads, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpc_ext._native import native

pytestmark = pytest.mark.skipif(not hasattr(native, "PixelSteps"), reason="the compiled module is missing")

ABOVE, BESIDE = 2, 1
BATCH, HEIGHT, WIDTH = 5, 4, 6


def map_of(channels, *, scale=1.0, dtype=torch.float64, height=HEIGHT, width=WIDTH):
    """Return a map with random pixels and a border of zeros."""
    pixels = torch.randn(BATCH, int(height * scale), int(width * scale), channels, dtype=dtype)
    return F.pad(pixels, (0, 0, BESIDE, BESIDE, ABOVE, 0))


def step_of(sources, outputs, *, level=0, image_bias=False, residual=None, raw=None, elu=None, scale=1, offset=(0, 0)):
    depth = sum(map.shape[3] * len(taps) for map, _, taps in sources)
    dtype = sources[0][0].dtype
    weight, bias = torch.randn(depth, outputs, dtype=dtype) / depth**0.5, torch.randn(outputs, dtype=dtype)
    added = torch.randn(BATCH, outputs, dtype=dtype) if image_bias else None
    return level, sources, weight, bias, added, residual, raw, elu, scale, offset


def plain(step, row, col):
    """Return the step's value at its own pixel, [B, F], in plain PyTorch."""
    _, sources, weight, bias, added, residual, *_ = step
    read = [
        map[:, row * scale + dy + ABOVE, col * scale + dx + BESIDE] for map, scale, taps in sources for dy, dx in taps
    ]
    value = torch.cat(read, 1) @ weight + bias
    value = value if added is None else value + added
    return value if residual is None else residual[:, row + ABOVE, col + BESIDE] + F.glu(value, 1)


def network(*steps):
    return native.PixelSteps(list(steps), BATCH, HEIGHT, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 5, 40])
@pytest.mark.parametrize("gated", [False, True])
def test_a_step_is_the_plain_formula(features, gated, dtype):
    torch.manual_seed(0)
    raw, elu = map_of(features, dtype=dtype), map_of(2 * features, dtype=dtype)
    sources = [(map_of(3, dtype=dtype), 1, [(-2, 1), (-1, -1), (0, 0)]), (map_of(7, dtype=dtype), 1, [(0, -1)])]
    residual = map_of(features, dtype=dtype) if gated else None
    step = step_of(sources, 2 * features if gated else features, image_bias=True, residual=residual, raw=raw, elu=elu)
    before = raw.clone(), elu.clone()
    network(step).run_pixel(2, 3)
    expected = plain(step, 2, 3)
    pixel = (slice(None), 2 + ABOVE, 3 + BESIDE)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(raw[pixel], expected, **tolerance)
    torch.testing.assert_close(elu[pixel], F.elu(torch.cat([expected, -expected], 1)), **tolerance)
    # No other pixel has changed.
    for map, old in zip((raw, elu), before, strict=True):
        map[pixel] = old[pixel]
        assert torch.equal(map, old)


def test_levels_and_scales():
    torch.manual_seed(0)
    fine, coarse, up, fixed = map_of(3), map_of(4, scale=0.5), map_of(2), map_of(2, height=1, width=1)
    down = step_of([(fine, 2, [(-1, -1), (0, 0)])], 4, level=1, raw=coarse)
    ups = [
        step_of([(coarse, 1, [(0, 0), (0, 1)])], 2, level=1, raw=up, scale=2, offset=(row, col))
        for row in range(2)
        for col in range(2)
    ]
    last = step_of([(up, 1, [(0, 0)])], 2, raw=fixed, scale=0)
    steps = network(down, *ups, last)
    untouched = coarse.clone(), up.clone()
    steps.run_pixel(2, 3)
    steps.run_pixel(1, 2)
    assert torch.equal(coarse, untouched[0])
    assert torch.equal(up, untouched[1])
    torch.testing.assert_close(fixed[:, ABOVE, BESIDE], plain(last, 1, 2))
    steps.run_pixel(2, 4)
    torch.testing.assert_close(coarse[:, 1 + ABOVE, 2 + BESIDE], plain(down, 1, 2))
    for step in ups:
        row, col = step[-1]
        torch.testing.assert_close(up[:, 2 + row + ABOVE, 4 + col + BESIDE], plain(step, 1, 2))
    torch.testing.assert_close(fixed[:, ABOVE, BESIDE], plain(last, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_its_pixels_whatever_the_threads(dtype):
    torch.manual_seed(0)
    source, raw = map_of(100, dtype=dtype), map_of(90, dtype=dtype)
    step = step_of([(source, 1, [(-1, -1), (-1, 0), (0, 0)])], 180, residual=map_of(90, dtype=dtype), raw=raw)
    steps, results = network(step), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            raw.zero_()
            steps.run_row(1)
            results.append(raw.clone())
            raw.zero_()
            for col in range(WIDTH):
                steps.run_pixel(1, col)
            results.append(raw.clone())
    finally:
        torch.set_num_threads(threads)
    assert results[0][:, 1 + ABOVE].any()
    assert all(torch.equal(result, results[0]) for result in results)


def test_tensors_live_as_long_as_the_network():
    steps = network(step_of([(map_of(3), 1, [(0, 0)])], 4, raw=map_of(4)))
    for _ in range(3):
        torch.full((BATCH, 100, 100), float("nan"))  # Would reuse the memory of tensors that are freed.
        steps.run_row(0)


def test_no_images():
    raw = torch.zeros(0, ABOVE + 2, 2 + 2 * BESIDE, 4)
    steps = native.PixelSteps(
        [(0, [(raw, 1, [(0, 0)])], torch.ones(4, 4), torch.ones(4), None, None, raw, None, 1, (0, 0))], 0, 2, 2
    )
    steps.run_row(1)
    steps.run_pixel(1, 1)


GOOD = {"sources": [(torch.zeros(BATCH, HEIGHT + ABOVE, WIDTH + 2 * BESIDE, 3), 1, [(0, 0)])], "outputs": 4}


def good_map(channels, *, height=HEIGHT, width=WIDTH, dtype=torch.float32):
    return torch.zeros(BATCH, height + ABOVE, width + 2 * BESIDE, channels, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raw": None}, "a step must have raw or elu to write to"),
        ({"raw": good_map(5)}, "raw must"),
        ({"raw": good_map(4, dtype=torch.float64)}, "raw must have the type of the other tensors"),
        ({"raw": good_map(4, height=HEIGHT - 1)}, "raw must"),
        ({"raw": good_map(4).transpose(1, 3)}, "raw must"),
        ({"elu": good_map(4)}, "elu must"),
        ({"level": 2}, "level must be one that the images' sides can be halved to, got 2"),
        ({"level": -1}, "level must be"),
        ({"scale": 3}, "output_scale must be 0, 1 or 2, got 3"),
        ({"offset": (0, 1)}, "offset must be within"),
        ({"residual": good_map(3)}, "residual must"),
        ({"sources": [(good_map(3), 1, [(-3, 0)])]}, r"taps must be within the map's border, got \(-3, 0\)"),
        ({"sources": [(good_map(3), 1, [(0, 2)])]}, r"taps must be within the map's border, got \(0, 2\)"),
        ({"sources": [(good_map(3), 2, [(0, 0)])]}, "a source's map must"),
        ({"sources": [(good_map(3), 4, [(0, 0)])]}, "a source's scale must be 1 or 2"),
        ({"sources": [(good_map(3)[0], 1, [(0, 0)])]}, "a source's map must be"),
        ({"sources": [(good_map(6)[..., ::2], 1, [(0, 0)])]}, "a source's map must have dense channels"),
    ],
)
def test_wrong_steps(changes, message):
    arguments = {**GOOD, "raw": good_map(4), **changes}
    if "sources" in changes and good_map(3)[0].shape == changes["sources"][0][0].shape:
        step = (0, changes["sources"], torch.ones(3, 4), torch.ones(4), None, None, good_map(4), None, 1, (0, 0))
    else:
        step = step_of(arguments.pop("sources"), arguments.pop("outputs"), **arguments)
    with pytest.raises(ValueError, match=message):
        network(step)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (2, torch.ones(4, 4), r"weight must"),
        (2, torch.ones(3), r"weight must be \[K, N\]"),
        (2, torch.ones(4, 3).T, "weight must be dense"),
        (3, torch.ones(3), "bias must"),
        (4, torch.ones(BATCH, 3), "image_bias must"),
        (4, torch.ones(BATCH, 4, dtype=torch.float16), "image_bias must have the type"),
    ],
)
def test_wrong_weights(index, value, message):
    step = list(step_of(GOOD["sources"], 4, raw=good_map(4)))
    step[index] = value
    with pytest.raises(ValueError, match=message):
        network(tuple(step))


def test_wrong_places():
    steps = network(step_of(GOOD["sources"], 4, raw=good_map(4)))
    with pytest.raises(ValueError, match=r"row must be in 0..3, got 4"):
        steps.run_row(HEIGHT)
    with pytest.raises(ValueError, match=r"col must be in 0..5, got -1"):
        steps.run_pixel(0, -1)
    with pytest.raises(ValueError, match="row must be in"):
        steps.run_pixel(-1, 0)
    with pytest.raises(ValueError, match="maps must be float32 or float64"):
        network(step_of([(good_map(3).half(), 1, [(0, 0)])], 4, raw=good_map(4).half()))


def test_a_device_is_given_the_plan_and_a_position(emulated_native):
    step = step_of(GOOD["sources"], 4, raw=good_map(4))
    there, position = torch.zeros(2, dtype=torch.int64), "position must be"
    on_cpu = emulated_native.PixelSteps([step], BATCH, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        on_cpu.run_on_device(torch.frombuffer(bytearray(on_cpu.plan()), dtype=torch.uint8).clone(), there, False)
    emulated_native.emulate_cuda(True)
    try:
        steps = emulated_native.PixelSteps([step], BATCH, HEIGHT, WIDTH)
        assert steps.on_device
        plan = torch.frombuffer(bytearray(steps.plan()), dtype=torch.uint8).clone()
        steps.run_on_device(plan, there, True)
        for wrong, message in (
            ((plan[:-1].clone(), there), "plan must be"),
            ((plan.long(), there), "plan must be"),
            ((plan, there.double()), position),
            ((plan, there.repeat(2)), position),
            ((plan, there.repeat(2)[::2]), position),
        ):
            with pytest.raises(ValueError, match=message):
                steps.run_on_device(*wrong, False)
        with pytest.raises(ValueError, match="must be on the CPU"):
            steps.run_pixel(0, 0)
    finally:
        emulated_native.emulate_cuda(False)
