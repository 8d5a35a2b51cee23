"""No kernel has a race: csrc/core/cuda/emulation/races.h finds all planted races, and none in the ops."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpc_ext.op_checks.agreement import KINDS, fp32_precision
from cpc_ext.ops import (
    AugmentationPlan,
    PixelMaps,
    PixelPlace,
    PixelSource,
    PixelStep,
    _contrast,
    _contrast_weights,
    augment_patches,
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    pixel_steps,
    sample_logistic_mixture,
    scores_logsumexp,
    sigmoid_contrast,
)
from cpc_ext.ops._library import with_workspace
from cpc_ext.ops._patch_transforms import Transform
from cpc_ext.ops.masked_conv2d import PixelConvolution
from tests.conftest import REPOSITORY, module_in, use_emulation

PROBES = Path(__file__).parent / "race_probes.cu"
# The planted races, each with the pairs of kinds of accesses that may race, by their names in the report.
RACES = {
    "lost_update": {("write", "read"), ("write", "write"), ("read", "write")},
    "same_value": {("write", "write")},
    "write_then_read": {("write", "read"), ("read", "write")},
    "read_then_write": {("read", "write"), ("write", "read")},
    "many_readers": {("read", "write"), ("write", "read")},
    "neighbours": {("write", "write")},
    "atomic_and_plain": {("atomic operation", "read"), ("read", "atomic operation")},
    **{
        f"no_fence_{between}": {("write", "read"), ("read", "write")}
        for between in ("shuffle", "vote", "product", "half_masks", "other_warp")
    },
    "rows_before_load": {("write", "read")},
    "rows_after_load": {("read", "write")},
    "chain_of_masks": {("write", "read"), ("read", "write")},
    "read_before_wait": {("asynchronous write", "read")},
    "read_of_later_group": {("asynchronous write", "read")},
    "read_of_others_copy": {("write", "read"), ("read", "asynchronous write"), ("asynchronous write", "read")},
    "barrier_without_wait": {("asynchronous write", "read"), ("write", "read")},
    "source_overwritten": {("asynchronous read", "write")},
    "destination_overwritten": {("asynchronous write", "write")},
    "two_copies_to_one_place": {("asynchronous write", "asynchronous write")},
    "pipeline_of_two": {("read", "asynchronous write"), ("asynchronous write", "read"), ("write", "read")},
    "update_by_blocks": {("write", "read"), ("write", "write"), ("read", "write")},
    "read_by_blocks": {("read", "write"), ("write", "read")},
    "no_wait_for_blocks": {("write", "read"), ("read", "write")},
    "wait_for_other_blocks": {("write", "read"), ("read", "write")},
    "copied_by_blocks": {("read", "write"), ("write", "asynchronous read"), ("write", "write")},
}
ACCESS = re.compile(r"(?:: |  and )([a-z ]+) by block \d+, thread \d+ in (.*)")


def probe(trace: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([trace / "race_probes", *arguments], capture_output=True, text=True, timeout=60)


def marked_lines(name: str) -> set[int]:
    """Return the numbers of the lines of a probe's kernel that are marked as racing."""
    kernel = "no_fence" if name.startswith("no_fence_") else name
    lines = PROBES.read_text().split("\n")
    first = next(i for i, line in enumerate(lines) if f"__global__ void {kernel}(" in line)
    last = lines.index("}", first)
    return {i + 1 for i in range(first, last) if lines[i].endswith("// RACE")}


@pytest.mark.parametrize("name", RACES)
def test_a_planted_race_is_found_where_it_is(trace, name):
    done = probe(trace, name)
    assert done.returncode == 1, done.stdout
    assert done.stdout.startswith(f"kernel {name}: ")
    found = ACCESS.findall(done.stdout)
    kinds = [kind for kind, _ in found]
    assert found
    assert set(zip(kinds[::2], kinds[1::2], strict=True)) <= RACES[name]
    lines = {int(re.search(r"race_probes\.cu:(\d+)", place)[1]) for _, place in found}  # The innermost.
    assert lines == marked_lines(name)


@pytest.mark.parametrize("name", RACES)
def test_no_race_is_found_where_something_orders_the_accesses(trace, name):
    done = probe(trace, name, "ordered")
    assert (done.returncode, done.stdout) == (0, "no race\n")


def test_every_probe_is_run(trace):
    assert sorted(probe(trace).stdout.split()) == sorted(RACES)


# --- The ops: no kernel races, with any options ---


@pytest.fixture
def traced(traced_native, monkeypatch):
    """Yield the module that the ops call, built so that a race is an error of the launch."""
    use_emulation(traced_native, monkeypatch)
    traced_native.emulate_cuda(True, [(99 << 10, 4)])
    traced_native.begin_trace({"races": {}})
    yield traced_native
    traced_native.end_trace()
    traced_native.emulate_cuda(False)


def normal(*shape, dtype=torch.float64, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def integers(end, *shape, dtype=torch.int64, seed=0):
    return torch.randint(end, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contrast(dtype, queries, keys, dim, batch=(), samples=None, options=True, reduction="mean"):
    rows = (*batch, queries)
    named = {}
    if options:
        targets = integers(keys, *rows)
        named = {"targets": targets, "exclude": (targets + 1) % keys, "weights": integers(3, *rows).double()}
    if samples is not None:
        named["negatives"] = integers(keys, *rows, samples, seed=1)
    tensors = normal(*rows, dim, dtype=dtype), normal(*batch, keys, dim, dtype=dtype, seed=1)
    info_nce(*tensors, **named, reduction=reduction).loss.sum().backward()


def contrast_freely(dtype, queries, keys, batch=(), positives=3, samples=None, reduction="mean"):
    """Run a contrast with every option at once, and all gradients."""
    rows = (*batch, queries)
    begin = integers(keys // 2, *rows)
    named = {
        "targets": integers(keys + 1, *rows, positives) - 1,
        "exclude": integers(keys + 1, *rows, 2, seed=1) - 1,
        "key_range": torch.stack([begin, begin + keys // 2], -1),
        "groups": (integers(3, *rows), integers(3, *batch, keys)),
        "contrast": "other",
    }
    named["exclude"][(named["exclude"].unsqueeze(-1) == named["targets"].unsqueeze(-2)).any(-1)] = -1
    if samples is not None:
        named["negatives"] = integers(keys, *rows, samples, seed=2)
    tensors = normal(*rows, 20, dtype=dtype), normal(*batch, keys, 20, dtype=dtype, seed=1)
    scale, bias = torch.tensor(0.3, requires_grad=True), normal(*batch, keys, seed=2)
    info_nce(*tensors, **named, scale=scale, key_bias=bias, reduction=reduction).loss.sum().backward()


def weigh_and_reduce(dtype, rows):
    """Run the weights and the reduction around a contrast of many queries."""
    sums = torch.promote_types(dtype, torch.float32)
    targets, weights = integers(3, 1, rows, 2) - 1, integers(3, 1, rows, seed=1).to(sums)
    weights = _contrast_weights.weigh(targets, weights, sums, True)
    results = weights, targets[..., 0].contiguous(), weights, weights.new_empty(()), weights.new_empty(()), True
    with_workspace(_contrast.native.info_nce_reduced, weights, *results)


def contrast_both_ways(dtype, count):
    scale, bias = torch.tensor(0.3, requires_grad=True), normal(count, seed=2)
    tensors = normal(count, 20, dtype=dtype), normal(count, 20, dtype=dtype, seed=1)
    info_nce(*tensors, scale=scale, key_bias=bias, symmetric=True).loss.backward()


def sum_scores(dtype, queries, keys):
    tensors = normal(queries, 20, dtype=dtype), normal(keys, 20, dtype=dtype, seed=1)
    scores_logsumexp(*tensors, key_bias=normal(keys, seed=2)).sum().backward()


def tell_pairs(dtype, count):
    scale, bias = torch.tensor(0.3, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    sigmoid_contrast(
        normal(count, 20, dtype=dtype), normal(count, 20, dtype=dtype, seed=1), scale=scale, bias=bias
    ).backward()


def convolve(dtype, batch, channels, outputs, size, mask, layout=torch.channels_last, *, weight_as=None, **options):
    mask = torch.as_tensor(mask, dtype=torch.bool)
    input = normal(batch, channels, *size, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
    weight = normal(outputs, channels, *mask.shape[-2:], dtype=dtype, seed=1)
    if weight_as == "fixed":
        weight = weight.detach()
    elif weight_as is not None:
        weight = weight.detach().contiguous(memory_format=weight_as).requires_grad_()
    bias = normal(outputs, dtype=dtype, seed=2)
    masked_conv2d(input, weight, bias, mask=mask, **options).sum().backward()


def convolve_pixels(dtype):
    weight, mask = normal(24, 16, 3, 3, dtype=dtype), torch.tensor(RASTER, dtype=torch.bool)
    input, output = (
        normal(3, channels, 4, 5, dtype=dtype).detach().contiguous(memory_format=torch.channels_last)
        for channels in (16, 12)
    )
    one = PixelConvolution(weight.detach(), mask=mask, activation="gated")
    for position in ((0, 0), (2, 3), (3, 4)):
        one(input, output, torch.tensor(position))


def extract(dtype, shape, patch_size, stride, layout=torch.contiguous_format, **options):
    images = integers(256, *shape, dtype=torch.uint8).contiguous(memory_format=layout)
    extract_patches(images, patch_size, stride, dtype=dtype, **options)
    images = (images.double() / 255).to(dtype).requires_grad_()
    extract_patches(images, patch_size, stride, dtype=dtype, **options).sum().backward()


def augment(dtype, side, patch_size, stride, steps, channels=3, **options):
    images = integers(256, 1, channels, side, side, dtype=torch.uint8)
    cells = 1, *2 * ((side - patch_size) // stride + 1,)
    count = cells[1] * cells[2]
    # Each transform in turn, even those that do nothing to a patch of one channel.
    codes = (torch.arange(count * steps) % len(Transform)).view(*cells, steps).to(torch.uint8)
    parameters = torch.rand(*cells, steps, 3, generator=torch.Generator().manual_seed(2))
    displacements = normal(*cells, 2, 4, 4, dtype=torch.float32).detach()
    plan = AugmentationPlan(codes, parameters, integers(count, *cells), displacements, 77)
    augment_patches(images, patch_size, stride, plan, dtype=dtype, **options)


def mix(dtype, channels, layout, components=3):
    images = integers(256, 2, channels, 9, 15, dtype=torch.uint8)
    params = normal(2, components * (10 if channels == 3 else 3), 9, 15, dtype=dtype)
    params = params.detach().contiguous(memory_format=layout).requires_grad_()
    logistic_mixture_nll(images, params).sum().backward()
    noise = torch.rand(2, components + channels, 9, 15, generator=torch.Generator().manual_seed(3))
    sample_logistic_mixture(params.detach(), channels=channels, noise=noise)


def run_steps(dtype):
    """Run plain and gated steps, at half the resolution and back, where blocks share two images."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    maps = PixelMaps(2, 4, 4, torch.empty(0, dtype=dtype))
    image, hidden, gated, back = maps.make(3, 0), maps.make(40, 0), maps.make(20, 0), maps.make(9, 0)
    half = maps.make(5, 1)

    def step(level, source, taps, outputs, **to):
        weight = normal(source.data.shape[3] * len(taps), outputs, dtype=dtype).detach()
        return PixelStep(level, [PixelSource(source, taps)], weight, weight[0].clone(), **to)

    steps = [
        step(0, image, [(-1, 0), (0, -1)], 20, elu=hidden),
        step(0, hidden, [(-1, 1), (0, 0)], 40, residual=gated, raw=maps.make(20, 0)),
        step(1, hidden, [(0, 0), (0, 1)], 5, raw=half),
        step(0, hidden, [(0, 0)], 3, raw=maps.make(3, None)),
        *(step(1, half, [(0, 0)], 9, raw=back, offset=(row, col)) for row in range(2) for col in range(2)),
    ]
    run, place = pixel_steps(steps, maps), PixelPlace(4, 4, torch.device("cpu"), levels=2)
    for row, col in itertools.product(range(2), range(2)):
        place.go_to(row, col)
        run.run_pixel(place)
    place.go_to(2)
    run.run_row(place)


RASTER = [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
ABOVE = [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
OF_CHANNELS = torch.rand(130, 32, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.3
SCORES = {"score", "finish_rows", "add_to_queries", "add_to_keys", "finish_gradients"}
ALL_KEYS = {*SCORES, "score_positives", "find_largest_weight"}
STORED = {"measure_tiles", "weigh_tiles", "add_to_bias"}
SAMPLED = {"contrast_sampled", "count_buckets", "place_by_bucket", "sort_buckets", "sum_sampled_keys"}
REDUCTION = {"weigh_rows", "sum_parts_of_rows", "finish_sums"}
CONVOLUTION = {"pack_weights", "convolve", "sum_weight_grad", "finish_weight_grad"}
ACTIVATED = CONVOLUTION | {"differentiate_activation"}
PATCHES = {"extract_tiles", "sum_patches"}
GATHERED = {"extract_gathered", "sum_patches"}  # Rows of 15 bytes are not copied.
LIKELIHOOD = {"mixture_nll", "mixture_nll_backward", "sum_parts"}
MIXTURE = {*LIKELIHOOD, "sample_pixels"}
IN_FLOAT = {*LIKELIHOOD, "extract_tiles"}  # In float64, the likelihood has only a reference, and patches are gathered.
# Kernels that prepare queries and keys for tensor cores, which float64 does not use.
ON_TENSOR_CORES = {"pack_rows", "gather_positives", "find_limits", "scale_queries", "put_positives"}
IMAGES = {"offsets": torch.tensor([[0, 1], [3, 2]]), "flip": torch.tensor([True, False]), "crop": (12, 11)}


# Functions that run ops in a given type, and the kernels that each of them must launch.
PROBLEMS = {
    "all keys": (lambda dtype: contrast(dtype, 67, 90, 20, batch=(2,)), {*ALL_KEYS, "gather_positives"}),
    "all keys, plain": (
        lambda dtype: contrast(dtype, 130, 130, 33, options=False, reduction="none"),
        {*ALL_KEYS, "pack_rows"},
    ),
    "all keys, in parts": (lambda dtype: contrast(dtype, 65, 1100, 8, options=False), ALL_KEYS),
    "all keys, in chunks": (lambda dtype: contrast(dtype, 3, 600, 4), {*ALL_KEYS, "put_positives"}),
    "all keys, few": (lambda dtype: contrast(dtype, 1, 2, 1), ALL_KEYS),
    "all keys, no queries": (lambda dtype: contrast(dtype, 0, 5, 70, options=False), set()),
    "all keys, every option": (
        lambda dtype: contrast_freely(dtype, 67, 90, batch=(2,)),
        {*ALL_KEYS, *STORED, "find_limits"},
    ),
    "all keys, both ways": (
        lambda dtype: contrast_both_ways(dtype, 90),
        {*ALL_KEYS, *STORED, "merge_columns", "finish_columns", "scale_queries"},
    ),
    "all keys, log-sums": (lambda dtype: sum_scores(dtype, 67, 90), {*SCORES, *STORED, "find_limits"}),
    "all keys, pairs": (lambda dtype: tell_pairs(dtype, 70), {*ALL_KEYS, *STORED}),
    "sampled, every option": (lambda dtype: contrast_freely(dtype, 13, 17, batch=(2,), samples=37), SAMPLED),
    "weights and losses": (lambda dtype: weigh_and_reduce(dtype, 9000), REDUCTION),
    "sampled": (lambda dtype: contrast(dtype, 13, 17, 70, batch=(2,), samples=37), SAMPLED),
    "sampled, plain": (lambda dtype: contrast(dtype, 9, 9, 130, samples=0, options=False, reduction="sum"), SAMPLED),
    "convolution": (lambda dtype: convolve(dtype, 2, 3, 6, (5, 6), RASTER), CONVOLUTION),
    "convolution of no tap": (lambda dtype: convolve(dtype, 2, 3, 4, (4, 4), [[0, 0, 0]]), {"convolve"}),
    "convolution, relu": (
        lambda dtype: convolve(dtype, 1, 17, 6, (5, 6), [[1, 1], [0, 1]], torch.contiguous_format, activation="relu"),
        ACTIVATED,
    ),
    "convolution, gated": (
        lambda dtype: convolve(
            dtype, 9, 24, 136, (5, 6), ABOVE, activation="gated", condition=normal(9, 136, 1, 1, dtype=dtype)
        ),
        ACTIVATED,
    ),
    "convolution, mask of channels": (
        lambda dtype: convolve(dtype, 5, 32, 130, (8, 8), OF_CHANNELS, activation="relu"),
        ACTIVATED,
    ),
    "convolution, dilated": (lambda dtype: convolve(dtype, 3, 40, 8, (7, 7), RASTER, dilation=3), CONVOLUTION),
    "convolution, fixed weights": (
        lambda dtype: convolve(dtype, 2, 3, 6, (5, 6), RASTER, weight_as="fixed"),
        {"pack_weights", "convolve", "differentiate_activation", "sum_bias_parts"},
    ),
    "convolution, weights in place": (  # For 16-bit types with two teams of warps, and wide tiles for their gradient.
        lambda dtype: convolve(dtype, 2, 32, 320, (8, 9), ABOVE, weight_as=torch.channels_last),
        {"convolve", "differentiate_activation", "sum_weight_grad", "finish_weight_grad"},
    ),
    "convolution of a pixel": (convolve_pixels, {"pack_weights", "convolve"}),
    "patches": (lambda dtype: extract(dtype, (2, 3, 17, 16), 5, 3, **IMAGES), PATCHES),
    "patches, normed": (
        lambda dtype: extract(dtype, (2, 3, 17, 16), 4, 2, gray=True, patch_norm=True, mean=[0.4], std=[0.2]),
        {*PATCHES, "find_norm_slopes"},
    ),
    "patches, channels last": (
        lambda dtype: extract(dtype, (2, 3, 17, 16), 8, 4, torch.channels_last, channels_last=True, **IMAGES),
        PATCHES,
    ),
    "patches of many values": (lambda dtype: extract(dtype, (1, 3, 34, 36), 16, 8, std=[2.0] * 3), PATCHES),
    "patches in bands of rows": (lambda dtype: extract(dtype, (1, 3, 96, 96), 64, 32, std=[2.0] * 3), PATCHES),
    "patches that are pieces": (lambda dtype: extract(dtype, (3, 3, 40, 32), 16, 8), {*PATCHES, "copy_patches"}),
    "patches, gathered": (lambda dtype: extract(dtype, (2, 3, 17, 15), 5, 3, **IMAGES), GATHERED),
    "patches, gathered and normed": (
        lambda dtype: extract(dtype, (2, 3, 17, 15), 8, 4, patch_norm=True, channels_last=True, **IMAGES),
        {*GATHERED, "find_norm_slopes"},
    ),
    "large patches": (
        lambda dtype: extract(dtype, (1, 3, 100, 100), 96, 4, patch_norm=True),
        {"extract_direct", "find_norm_slopes", "sum_patches"},
    ),
    "augmented": (lambda dtype: augment(dtype, 40, 8, 8, steps=5), {"augment_patches"}),
    "augmented, normed": (
        lambda dtype: augment(dtype, 33, 15, 9, steps=11, patch_norm=True, channels_last=True),
        {"augment_patches"},
    ),
    "augmented, a block a patch": (
        lambda dtype: augment(dtype, 44, 36, 8, steps=11, patch_norm=True),
        {"augment_patches"},
    ),
    "augmented, of one channel": (lambda dtype: augment(dtype, 24, 8, 8, steps=5, channels=1), {"augment_patches"}),
    "augmented, large": (lambda dtype: augment(dtype, 132, 131, 1, steps=6), {"augment_patches"}),
    "steps of a pixel": (run_steps, {"run_steps"}),
    "mixture": (lambda dtype: mix(dtype, 3, torch.channels_last), MIXTURE),
    "mixture, by channels": (lambda dtype: mix(dtype, 3, torch.contiguous_format), MIXTURE),
    "mixture of one channel": (lambda dtype: mix(dtype, 1, torch.channels_last, components=2), MIXTURE),
}  # fmt: skip
DTYPES = {name: kind.dtype for name, kind in KINDS.items()}
# With few blocks, each has more than one share of the work. These cases, and the largest, run in two of the types only.
CASES = [
    (blocks, problem, dtype)
    for blocks, problem, dtype in itertools.product((None, 3), PROBLEMS, DTYPES)
    if dtype in ("float32", "bfloat16") or (blocks is None and problem != "all keys, in chunks")
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("blocks", "problem", "dtype"), CASES)
def test_no_kernel_races(traced, monkeypatch, blocks, problem, dtype):
    if blocks is not None:
        monkeypatch.setenv("CPC_EMULATION_GRID", str(blocks))
    if problem == "all keys, in chunks":
        monkeypatch.setenv("CPC_EMULATION_POWERS_KIB", "512")
    ask, kernels = PROBLEMS[problem]
    with fp32_precision("tf32" if dtype == "tf32" else "ieee"):
        ask(DTYPES[dtype])
    launches = traced.end_trace()["races"]["launches"]
    others = IN_FLOAT | ON_TENSOR_CORES if dtype == "float64" else set()
    assert kernels - others - ({"find_largest_weight"} if dtype != "float16" else set()) <= set(launches)


def test_every_kernel_is_asked_for_something():
    sources = [path.read_text() for path in (PROBES.parents[2] / "csrc").glob("*/*.cu*")]
    names = [
        re.findall(r'launch(?:_\w+)?(?:<[^(]*>)?\(\s*"(\w+)"|name = .*"(\w+)" : "(\w+)"', source) for source in sources
    ]
    known = {name for found in names for groups in found for name in groups if name}
    assert known == set().union(*(kernels for _, kernels in PROBLEMS.values()))


# --- A sample of a launch's blocks ---


@pytest.mark.parametrize(("blocks", "parts"), [(0, 12), (4, 4), (5, 5), (100, 12)])
def test_a_sample_is_one_block_of_each_part(traced, blocks, parts):
    traced.begin_trace({"races": {}}, blocks)
    images, patches = torch.ones(12, 1, 4, 4), torch.zeros(12, 1, 1, 1, 4, 4)
    traced.extract_patches(images, patches, 4, 4, 4, 4, None, None, False, False, False, [0.5], [0.0])
    run = patches.flatten(1).any(1)  # One block per image.
    assert [int(run[12 * i // parts : 12 * (i + 1) // parts].sum()) for i in range(parts)] == [1] * parts


def test_observers_and_their_options_are_known_by_name(traced):
    with pytest.raises(ValueError, match="there is no observer nonsense"):
        traced.begin_trace({"nonsense": {}})
    with pytest.raises(ValueError, match="races has no option nonsense"):
        traced.begin_trace({"races": {"nonsense": 1}})


# --- A barrier taken out of a kernel leads to a race. Comments in the lines must match the sources'. ---


def module_without(trace: Path, barrier: str, header: str, kernels: str, folder: Path) -> Path:
    """Build the traced module from sources without the line `barrier`, and return its folder."""
    sources, copy = REPOSITORY / "csrc", folder / "csrc"
    shutil.copytree(sources, copy)
    text = (copy / header).read_text()
    assert text.count(barrier) == 1
    (copy / header).write_text(text.replace(barrier, ""))
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    (library,) = trace.glob("_C.*.so")
    commands = subprocess.run([ninja, "-C", trace, "-t", "commands", library.name], capture_output=True, text=True)
    *compile_commands, link = commands.stdout.strip().split("\n")
    made, mine = f"CMakeFiles/emulated_kernels.dir/csrc/{kernels}.o", f"{folder}/kernels.o"
    (compile_kernels,) = (command for command in compile_commands if f" -o {made} " in command)
    compile_kernels = compile_kernels.replace(str(sources), str(copy)).replace(made, mine)
    link = link.replace(made, mine).replace(f"-o {library.name}", f"-o {folder / library.name}")
    for command in (compile_kernels, link):
        done = subprocess.run(command, shell=True, cwd=trace, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("barrier", "header", "kernels", "problem", "kernel"),
    [
        (
            "__syncthreads();  // A row's dot products are there, whoever copied them.",
            *("info_nce/stored_dots.cuh", "info_nce/cuda.cu", "all keys, pairs", "measure_tiles"),
        ),
        (
            "__syncthreads();  // The next slice is there for all, and all have read this one.",
            *("core/cuda/product.cuh", "masked_conv/cuda.cu", "convolution", "convolve"),
        ),
        (  # Matters only where a block has more than one tile.
            "__syncthreads();  // The next tile overwrites shared memory.",
            *("patches/extract.cuh", "patches/cuda.cu", "patches, gathered", "extract_gathered"),
        ),
        (
            "if (waits) wait_for_blocks(barrier, a.blocks, member == 0);",
            *("pixel_steps/cuda.cu", "pixel_steps/cuda.cu", "steps of a pixel", "run_steps"),
        ),
        (
            "__syncthreads();  // All pixels are transformed.",
            *("patches/extract.cuh", "patches/cuda.cu", "patches", "extract_tiles"),
        ),
    ],
    ids=["scores", "product", "tiles", "blocks", "pixels"],
)
def test_a_barrier_left_out_of_a_kernel_is_missed(
    trace, tmp_path, monkeypatch, barrier, header, kernels, problem, kernel
):
    module = module_in(module_without(trace, barrier, header, kernels, tmp_path), f"without_{kernel}")
    use_emulation(module, monkeypatch)
    module.emulate_cuda(True, [(99 << 10, 4)])
    module.begin_trace({"races": {}})
    monkeypatch.setenv("CPC_EMULATION_GRID", "1")
    ask, _ = PROBLEMS[problem]
    with fp32_precision("ieee"):
        for dtype in DTYPES.values():
            if kernel in IN_FLOAT and dtype == torch.float64:
                continue
            with pytest.raises(RuntimeError, match=f"kernel {kernel}: .* races?\n"):
                ask(dtype)
