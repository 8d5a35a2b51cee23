"""Networks run pixel by pixel: the kernel and its reference against the formula, and positions in errors."""

from __future__ import annotations

import itertools
import re
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from cpc_ext._native import native
from cpc_ext.ops import PixelMaps, PixelPlace, PixelSource, PixelStep, pixel_steps
from cpc_ext.ops.pixel_steps import _KernelSteps, _ReferenceSteps
from tests.conftest import use_emulation

BATCH, HEIGHT, WIDTH = 2, 4, 8
RUNNERS = ["reference", *(["kernel"] if hasattr(native, "PixelSteps") else [])]


@pytest.fixture(params=[*RUNNERS, "emulated", "emulated, blocks share images", "emulated, a block for all"])
def runner(request, monkeypatch):
    """The class that runs steps; on the emulated device, 2, 6 or 1 blocks fit."""
    if not request.param.startswith("emulated"):
        yield _ReferenceSteps if request.param == "reference" else _KernelSteps
        return
    emulated = request.getfixturevalue("emulated_native")
    use_emulation(emulated, monkeypatch)
    fit = {"emulated": 2, "emulated, blocks share images": 6, "emulated, a block for all": 1}[request.param]
    emulated.emulate_cuda(True, [(99 << 10, fit)])
    yield _KernelSteps
    emulated.emulate_cuda(False)


def random_maps(dtype=torch.float64):
    torch.manual_seed(0)
    return PixelMaps(BATCH, HEIGHT, WIDTH, torch.empty(0, dtype=dtype))


def filled(maps, channels, level=0):
    """A map with random pixels."""
    map = maps.make(channels, level)
    map.pixels.normal_()
    return map


def step_of(maps, level, sources, outputs, **options):
    sources = [PixelSource(map, taps) for map, taps in sources]
    depth = sum(source.map.data.shape[3] * len(source.taps) for source in sources)
    weight, bias = torch.randn(depth, outputs) / depth**0.5, torch.randn(outputs)
    return PixelStep(level, sources, *(value.to(sources[0].map.data.dtype) for value in (weight, bias)), **options)


def network(maps):
    """Steps of every kind: to half the resolution and back, gated and not, of one source and several."""
    image = filled(maps, 3)
    fine, fine_elu, gated = maps.make(6, 0), maps.make(12, 0), maps.make(6, 0)
    coarse, coarser, last = maps.make(5, 1), maps.make(4, 2), maps.make(2, None)
    back, only_elu = maps.make(4, 1), maps.make(8, 0)
    return [
        step_of(maps, 0, [(image, [(-2, 1), (-1, -1), (0, -1)])], 6, raw=fine, elu=fine_elu),
        step_of(
            maps,
            0,
            [(fine_elu, [(-1, 0), (0, 0)]), (image, [(-1, 1)])],
            12,
            image_bias=torch.randn(BATCH, 12, dtype=fine.data.dtype),
            residual=fine,
            raw=gated,
        ),
        step_of(maps, 0, [(fine_elu, [(0, 0)])], 4, elu=only_elu),
        step_of(maps, 1, [(gated, [(-1, 1), (0, 0)])], 5, raw=coarse),
        step_of(maps, 2, [(coarse, [(0, -1), (0, 0)])], 4, raw=coarser),
        *(
            step_of(maps, 2, [(coarser, [(0, 0)])], 4, raw=back, offset=(row, col))
            for row, col in itertools.product(range(2), range(2))
        ),
        step_of(maps, 0, [(gated, [(0, 0)])], 2, raw=last),
    ]


def plain(step, row, col):
    """A step's value at its own pixel, [B, N], by the formula."""

    def at(map, dy=0, dx=0):
        scale = 1 << (step.level - map.level)
        return F.pad(map.pixels, (0, 0, 2, 2, 2, 2))[:, row * scale + dy + 2, col * scale + dx + 2]

    read = [at(source.map, *tap) for source in step.sources for tap in source.taps]
    value = torch.cat(read, 1) @ step.weight + step.bias
    value = value if step.image_bias is None else value + step.image_bias
    return value if step.residual is None else at(step.residual) + F.glu(value, 1)


@pytest.mark.parametrize("by_row", [False, True])
def test_every_step_is_its_formula_at_every_pixel(runner, by_row):
    maps = random_maps()
    steps, place = network(maps), PixelPlace(HEIGHT, WIDTH, torch.device("cpu"), levels=3)
    run = runner(steps, maps)
    for row, col in itertools.product(range(HEIGHT), range(1 if by_row else WIDTH)):
        place.go_to(row, col)
        (run.run_row if by_row else run.run_pixel)(place)
    for step, (row, col) in itertools.product(steps[:-1], itertools.product(range(HEIGHT), range(WIDTH))):
        side = 1 << step.level
        if row % side or col % side:
            continue
        own = row // side, col // side
        expected = plain(step, *own)
        scale = 1 << (step.level - (step.raw or step.elu).level)
        at = slice(None), own[0] * scale + step.offset[0], own[1] * scale + step.offset[1]
        if step.raw is not None:
            torch.testing.assert_close(step.raw.pixels[at], expected, rtol=1e-12, atol=1e-12)
        if step.elu is not None:
            elu = F.elu(torch.cat([expected, -expected], 1))
            torch.testing.assert_close(step.elu.pixels[at], elu, rtol=1e-12, atol=1e-12)
    if not by_row:  # The map of one pixel holds the latest.
        torch.testing.assert_close(steps[-1].raw.pixels[:, 0, 0], plain(steps[-1], HEIGHT - 1, WIDTH - 1))
    for map in (map for step in steps for map in (step.raw, step.elu) if map is not None):
        map.pixels.zero_()
        assert not map.data.any()  # Nothing is written beside the pixels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_its_reference(runner, dtype):
    results = []
    for runs in (_ReferenceSteps, runner):
        maps = random_maps(dtype)
        steps, place = network(maps), PixelPlace(HEIGHT, WIDTH, torch.device("cpu"), levels=3)
        run = runs(steps, maps)
        for row, col in itertools.product(range(HEIGHT), range(WIDTH)):
            place.go_to(row, col)
            run.run_pixel(place)
        results.append([(step.raw or step.elu).data for step in steps])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_many_values_and_features(runner, gated, dtype):
    """Deeper than what a GPU's block keeps at a time, and wider than what it sums."""
    maps = random_maps(dtype)
    source, other, raw, elu = filled(maps, 300), filled(maps, 5), maps.make(44, 0), maps.make(88, 0)
    read = [(source, [(-1, -1), (-1, 0), (0, -1), (0, 0)]), (other, [(0, 0)])]
    residual = filled(maps, 44) if gated else None
    step = step_of(maps, 0, read, 88 if gated else 44, residual=residual, raw=raw, elu=elu)
    run, place = runner([step], maps), PixelPlace(HEIGHT, WIDTH, torch.device("cpu"))
    place.go_to(1)
    run.run_row(place)
    of_row = raw.pixels.clone()
    raw.pixels.zero_()
    place.go_to(1, 5)
    run.run_pixel(place)
    assert runner is _ReferenceSteps or torch.equal(raw.pixels[:, 1, 5], of_row[:, 1, 5])
    precise = 1e-12 if dtype == torch.float64 else 1e-5
    for col in range(WIDTH):
        expected = plain(step, 1, col)
        torch.testing.assert_close(of_row[:, 1, col], expected, rtol=precise, atol=precise)
        both = F.elu(torch.cat([expected, -expected], 1))
        torch.testing.assert_close(elu.pixels[:, 1, col], both, rtol=precise, atol=precise)


def test_sums_are_the_same_however_many_blocks_share_images(emulated_native, monkeypatch):
    use_emulation(emulated_native, monkeypatch)
    results = []
    for fit in (1, 3, 7):
        emulated_native.emulate_cuda(True, [(99 << 10, fit)])
        maps = random_maps(torch.float32)
        steps, place = network(maps), PixelPlace(HEIGHT, WIDTH, torch.device("cpu"), levels=3)
        _KernelSteps(steps, maps).run_row(place)
        results.append([(step.raw or step.elu).data for step in steps])
    emulated_native.emulate_cuda(False)
    assert all(torch.equal(*pair) for result in results for pair in zip(result, results[0], strict=True))


def test_weights_stay_where_they_are_read(runner):
    """A device reads them where they are, whatever becomes of the list of steps and of the steps."""
    maps = random_maps(torch.float32)
    steps = network(maps)
    weights = [weakref.ref(step.weight) for step in steps]
    run = runner(list(steps), maps)
    for step in steps:
        step.weight, step.bias = torch.zeros(0), None
    assert runner is _ReferenceSteps or all(weight() is not None for weight in weights)
    del run


def test_who_runs_steps():
    """The kernel on the CPU, the reference where there is none, as on meta."""
    maps = random_maps()
    assert type(pixel_steps(network(maps), maps)) is (_KernelSteps if "kernel" in RUNNERS else _ReferenceSteps)
    maps = PixelMaps(BATCH, HEIGHT, WIDTH, torch.empty(0, device="meta"))
    run = pixel_steps(network(maps), maps)
    assert type(run) is _ReferenceSteps
    assert all(offset.is_meta for offsets in run._offsets for offset in offsets)


def put(**values):
    """Return a change of a step. values: new attributes, or functions of the step and its maps that return them."""

    def change(step, maps):
        for name, value in values.items():
            setattr(step, name, value(step, maps) if callable(value) else value)

    return change


def tap(row, col):
    return put(sources=lambda step, maps: [step.sources[0]._replace(taps=[(-1, 0), (row, col), (0, -1)])])


WRONG = {
    "level must be one that the images' sides can be halved to, got 3": put(level=3),
    "weight must be [K, N], got [9]": put(weight=lambda step, maps: step.weight[:, 0]),
    "weight must be [9, 6], got [8, 6]": put(weight=lambda step, maps: step.weight[1:]),
    "bias must be [6], got [5]": put(bias=lambda step, maps: step.bias[1:]),
    "bias must have the type of the other tensors": put(bias=lambda step, maps: step.bias.float()),
    "image_bias must be [2, 6], got [1, 6]": put(image_bias=lambda step, maps: step.bias[None]),
    "residual must be [2, 6, 10, 3], got [2, 6, 10, 6]": put(residual=lambda step, maps: maps.make(6, 0)),
    "gated outputs must be even in number, got 5": put(
        weight=lambda step, maps: step.weight[:, 1:].contiguous(),
        bias=lambda step, maps: step.bias[1:].contiguous(),
        residual=lambda step, maps: maps.make(2, 0),
    ),
    "taps must be within the map's border, got (1, 0)": tap(1, 0),
    "taps must be within the map's border, got (-3, 0)": tap(-3, 0),
    "taps must be within the map's border, got (0, 2)": tap(0, 2),
    "a source's scale must be 1 or 2": put(level=2, raw=lambda step, maps: maps.make(6, 2), elu=None),
    "output_scale must be 0, 1 or 2, got 4": put(
        level=2,
        sources=lambda step, maps: [step.sources[0]._replace(map=maps.make(3, 2))],
    ),
    "offset must be within the output_scale x output_scale pixels": put(offset=(0, 1)),
    "a step must have raw or elu to write to": put(raw=None, elu=None),
    "raw must be [2, 6, 10, 6], got [2, 6, 10, 12]": put(raw=lambda step, maps: maps.make(12, 0)),
    "elu must be [2, 6, 10, 12], got [2, 6, 10, 6]": put(elu=lambda step, maps: maps.make(6, 0)),
    "raw must not share memory with elu": put(raw=lambda step, maps: step.elu),
    "raw must not share memory with residual": put(residual=lambda step, maps: step.raw),
    "elu must not share memory with a source's map": put(elu=lambda step, maps: step.sources[0].map),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_steps_are_refused(runner, message):
    maps = random_maps()
    step = network(maps)[0]
    runner([step], maps)
    WRONG[message](step, maps)
    with pytest.raises(ValueError, match=re.escape(message)):
        runner([step], maps)


def test_places():
    place = PixelPlace(8, 12, torch.device("cpu"), levels=3)
    maps = PixelMaps(1, 8, 12, torch.empty(0))
    numbers = [maps.make(1, level) for level in range(3)]
    for map in numbers:
        map.pixels.copy_(torch.arange(map.pixels.numel()).view_as(map.pixels))
    for row, col in itertools.product(range(8), range(12)):
        place.go_to(row, col)
        assert (place.row, place.col) == (row, col) == tuple(place.position.tolist())
        assert place.index.tolist() == [row * 12 + col]
        begins = [row % side == col % side == 0 for side in (1, 2, 4)]
        assert place.levels == sum(begins)
        for level, map in enumerate(numbers[: place.levels]):
            found = map.flat[0, place.at[level], 0].tolist()
            assert found == [(row >> level) * (12 >> level) + (col >> level)]
    place.go_to(4)
    assert [position.tolist() for position in place.row_positions()] == [[4, col] for col in range(12)]
    for level, (map, at) in enumerate(zip(numbers, place.row_at(), strict=True)):
        assert map.flat[0, at, 0].tolist() == map.pixels[0, 4 >> level, :, 0].tolist()
    assert PixelPlace(2, 3, torch.device("cpu")).levels == 1
    levels = []
    for row in place.rows_of_levels():
        place.go_to(row)
        levels.append(place.levels)
    assert levels == [3, 1, 2]


def test_maps_are_cut_from_blocks_and_aligned(monkeypatch):
    monkeypatch.setattr(sys.modules["cpc_ext.ops.pixel_steps"], "_BLOCK", 1008)
    maps = PixelMaps(2, 3, 4, torch.empty(0, dtype=torch.float64))
    made = [maps.make(channels, level) for channels, level in ((3, 0), (5, 0), (1, 1), (40, None), (12, 1), (200, 0))]
    assert [tuple(map.pixels.shape) for map in made] == [
        (2, 3, 4, 3),
        (2, 3, 4, 5),
        (2, 1, 2, 1),
        (2, 1, 1, 40),
        (2, 1, 2, 12),
        (2, 3, 4, 200),
    ]
    assert [len(block) for block in maps.blocks] == [1008, 1008, 2 * 5 * 6 * 200]
    assert not any(map.data.any() for map in made)
    for index, map in enumerate(made):
        assert map.data.dtype == torch.float64
        assert map.data.storage_offset() % 16 == 0
        map.data.fill_(index)  # None has memory of another.
    assert all((map.data == index).all() for index, map in enumerate(made))
