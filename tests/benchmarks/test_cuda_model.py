"""Predicted times against published figures of other kernels, and the parts of the model."""

import fnmatch
import importlib
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import cuda_model
import pytest
import torch
from cuda_counts import COUNTS, Launch, Problem, Product, Sweep, load, save
from cuda_machines import MACHINES
from cuda_model import (
    INSTRUCTIONS,
    OTHER_INSTRUCTIONS,
    Code,
    blocks_at_once,
    completed,
    confront,
    predict,
    predict_eager,
    predict_launch,
    throughput,
    turns_of,
)
from cuda_pytorch import cases_by_key, eager_steps, surrounding_launches

A100, H100, RTX_4090 = MACHINES["A100"], MACHINES["H100"], MACHINES["RTX 4090"]


# --- Known kernels: counts by hand, from each algorithm's tiles ---


def product_of_ampere(n):
    """n x n x n in bfloat16 as ampere_bf16_s16816gemm_128x256_stages_64x3: 8 warps of 64 x 64, steps of 64 in depth.

    For a depth of 16, a warp multiplies 4 x 8 tiles of 16 x 8 x 16. Meanwhile it loads the operands of the next 16:
    4 + 4 times four matrices of 8 x 8 (16 by 16 values), each in 4 passes. A block copies (128 + 256) * 64 values in
    each step, 16 bytes at a time: 12 copies for each thread.
    """
    blocks, steps = (n // 128) * (n // 256), n // 64
    warps = 8 * blocks * steps * 4  # And 16s of depth.
    copied = blocks * steps * (128 + 256) * 64 * 2
    launch = Launch(
        kernel="gemm",
        grid=blocks,
        block=256,
        dynamic_shared_bytes=3 * (128 + 256) * 64 * 2,
        mma={"m16n8k16.bf16": warps * 4 * 8},
        shared_wavefronts=warps * (4 + 4) * 4 + copied / 128,
        copies={"16": copied / 16},
        read_requests=copied / 512,
        read_sectors=copied / 32,
        unique_read_bytes=2 * n * n * 2,
        unique_written_bytes=n * n * 2,
        written_sectors=n * n * 2 / 32,
    )
    loop = 4 * (32 + 8) + 12 + 20  # Products, loads, copies, and instructions that count and jump.
    return launch, Code(registers=230, loop=loop, tensor=4 * 32, barriers=1, loads=12, ahead=1, reads_ahead=True)


def product_of_hopper(n):
    """The same on Hopper, as 128 x 256 x 64 in clusters of 2 x 1: 2 groups of 4 warps, wgmma of 64 x 256 x 16.

    What cuBLAS does is not published; these are CUTLASS's usual tiles. A group's product reads its 64 + 256 rows of 32
    bytes from shared memory. Two blocks share what they copy of B, so that a block's share is (128 + 128) * 64 values a
    step.
    """
    blocks, steps = (n // 128) * (n // 256), n // 64
    products = blocks * steps * 4 * 2
    copied, stored = blocks * steps * (128 + 128) * 128, blocks * steps * (128 + 256) * 128
    launch = Launch(
        kernel="gemm",
        grid=blocks,
        block=256,
        dynamic_shared_bytes=4 * (128 + 256) * 64 * 2,
        mma={"wgmma.m64n256k16.bf16": products},
        shared_wavefronts=(products * (64 + 256) * 32 + stored) / 128,
        copies={"16": copied / 16},
        read_requests=copied / 512,
        read_sectors=copied / 32,
        unique_read_bytes=2 * n * n * 2,
        unique_written_bytes=n * n * 2,
        written_sectors=n * n * 2 / 32,
        instructions=products * 4 * 4,  # Each of the 4 warps issues it, and a few that wait.
    )
    return launch, Code(registers=168, tensor=1, ahead=2, reads_ahead=True)


def flash_attention_2(length, batch, heads, dim):
    """The forward pass of 2307.08691: blocks of 128 queries by 64 keys, 4 warps of 32 queries, no causal mask.

    For 64 keys a warp multiplies 2 x 8 tiles of 16 x 8 for scores, each dim / 16 deep, and 2 x dim / 8 for outputs,
    each 64 / 16 deep; queries stay in registers, and keys and values are each loaded as 64 / 16 x dim / 16 times 16 by
    16 values. A score takes a multiply-add to scale and subtract, one exponential, a maximum, a sum and half a
    conversion; an output is rescaled once for 64 keys. 16 kB of keys and values are copied by 128 threads.
    """
    blocks, turns = length // 128 * batch * heads, length // 64
    warps = 4 * blocks * turns
    scores, outputs = 32 * 64, 32 * dim  # Of a warp and turn.
    tiles = 2 * 8 * (dim // 16) + 2 * (dim // 8) * 4
    loads = 2 * 4 * (dim // 16)
    copied = blocks * turns * 2 * 64 * dim * 2
    tensor = batch * heads * length * dim * 2
    launch = Launch(
        kernel="attention",
        grid=blocks,
        block=128,
        dynamic_shared_bytes=128 * dim * 2 + 2 * 64 * dim * 2,
        mma={"m16n8k16.bf16": warps * tiles},
        shared_wavefronts=warps * loads * 4 + copied / 128,
        copies={"16": copied / 16},
        read_requests=copied / 512,
        read_sectors=copied / 32,
        unique_read_bytes=3 * tensor,
        unique_written_bytes=tensor,
        written_sectors=tensor / 32,
        multiplies={"float32": warps * (3 * scores + outputs)},
        transcendentals=warps * scores,
        instructions=warps * (tiles + loads + (4.5 * scores + outputs) / 32 + 2 * 64 * dim * 2 / 16 / 128 + 20),
    )
    return launch, Code(registers=255, tensor=tiles, barriers=2, loads=16, ahead=0)


def copy(size):
    """A copy kernel with 16 bytes for each thread."""
    blocks = size // 16 // 256
    launch = Launch(
        kernel="copy",
        grid=blocks,
        block=256,
        read_requests=blocks * 8,
        read_sectors=size / 32,
        written_sectors=size / 32,
        unique_read_bytes=size,
        unique_written_bytes=size,
        instructions=blocks * 8 * 20,
    )
    return launch, Code(registers=16, loads=1, waits=1)


PRODUCT, ATTENTION, COPIED = 2 * 8192**3, 4 * 8192**2 * 128 * 2 * 16, 2 * (1 << 30)


@pytest.mark.parametrize(
    ("machine", "counted", "work", "published"),
    [
        # cuBLAS: about 255 TFLOP/s on an A100; on an H100 807, as our own run of 8192 x 8192 measured.
        (A100, product_of_ampere(8192), PRODUCT, 255e12),
        (H100, product_of_hopper(8192), PRODUCT, 807e12),
        # FlashAttention-2, arXiv 2307.08691, as it is quoted: up to 230 and 335 TFLOP/s.
        (A100, flash_attention_2(8192, 2, 16, 128), ATTENTION, 230e12),
        (H100, flash_attention_2(8192, 2, 16, 128), ATTENTION, 335e12),
        # A copy of 1 GiB, read and written: BabelStream, our own run, and what reviews measure. The table of machines
        # has these shares; this says that nothing else comes to bound a copy.
        (A100, copy(1 << 30), COPIED, 1.75e12),
        (H100, copy(1 << 30), COPIED, 2.93e12),
        (RTX_4090, copy(1 << 30), COPIED, 0.93e12),
    ],
    ids=["cuBLAS A100", "cuBLAS H100", "attention A100", "attention H100", "copy A100", "copy H100", "copy RTX 4090"],
)
def test_published_figures_are_met_within_a_quarter(machine, counted, work, published):
    predicted = work / predict_launch(machine, *counted).seconds
    assert 0.75 <= predicted / published <= 1.25, f"{predicted:.3g} predicted, {published:.3g} published"


# --- Parts of the model ---


def test_queues_between_one_job_and_very_many():
    demands, waiting = [3.0, 1.0, 2.0], 4.0
    assert throughput(demands, waiting, 1) == pytest.approx(1 / 10)
    # Two jobs, by hand: the second finds the first at each unit for its share of the time.
    second = 2 / (4 + 3 * 1.3 + 1 * 1.1 + 2 * 1.2)
    assert throughput(demands, waiting, 2) == pytest.approx(second)
    assert throughput(demands, waiting, 1.5) == pytest.approx((1 / 10 + second) / 2)
    assert throughput(demands, waiting, 0.25) == pytest.approx(1 / 40)
    assert throughput(demands, waiting, 500) == pytest.approx(1 / 3, rel=1e-2)


@pytest.mark.parametrize(
    ("machine", "block", "registers", "shared", "dynamic", "blocks"),
    [
        (H100, 128, 128, 0, 0, 4),
        (H100, 128, 101, 0, 0, 4),  # Registers come in eights.
        (H100, 256, 32, 0, 0, 8),
        (RTX_4090, 256, 32, 0, 0, 6),
        (H100, 32, 16, 0, 0, 32),
        (H100, 256, 128, 0, 64 << 10, 2),
        (A100, 128, 40, 1024, 52 << 10, 3),  # Of 164 KiB, each takes 54.
        (H100, 1024, 128, 0, 0, 1),  # More registers than there are: such a launch would fail.
    ],
)
def test_blocks_at_once_are_those_of_the_occupancy_calculator(machine, block, registers, shared, dynamic, blocks):
    launch = Launch(kernel="made", grid=1, block=block, dynamic_shared_bytes=dynamic)
    assert blocks_at_once(machine, launch, Code(registers=registers, shared=shared)) == blocks


def product_launch(grid):
    return Launch(kernel="made", grid=grid, block=128, mma={"m16n8k16.bf16": grid * 4 * 1000}, instructions=grid * 8000)


def test_the_last_wave_costs_a_whole_one():
    code = Code(registers=128, tensor=16)
    times = [predict_launch(A100, product_launch(108 * 4 * 5 + more), code).seconds for more in (0, 1, 108)]
    assert times[0] < times[1] == times[2]


def test_terms_and_what_bounds():
    many = predict_launch(A100, product_launch(108 * 40), Code(registers=64, tensor=16))
    assert many.bound == "tensor"
    assert many.terms["tensor"] == pytest.approx(108 * 40 * 4 * 1000 * 4096 / 312e12, rel=2e-3)
    # A warp a multiprocessor cannot keep its tensor core busy while it waits for each of its loads.
    waiting = replace(product_launch(108), block=32, read_requests=108 * 1000, read_sectors=108 * 16000)
    slow = predict_launch(A100, waiting, Code(registers=64, tensor=4, loads=1, waits=1, early=1))
    assert slow.bound == "latency"
    hidden = predict_launch(A100, waiting, Code(registers=64, tensor=4, loads=1, waits=1))
    assert hidden.seconds < 0.9 * slow.seconds
    empty = predict_launch(A100, Launch(kernel="empty", grid=1, block=32, instructions=1), Code())
    assert empty.bound == "launch"
    # The pause before the launch, and one latency until a block has its first values.
    assert empty.seconds == pytest.approx(A100.launch + A100.latency_l2 / A100.clock, rel=0.01)
    exponentials = replace(product_launch(108 * 40), mma={}, transcendentals=1e9)
    special = predict_launch(A100, exponentials, Code())
    assert (special.bound, special.terms["special"]) == ("special", pytest.approx(1e9 / 16 / 108 / 1.41e9))


def test_each_wait_costs_a_latency_and_other_warps_hide_it():
    one = Launch(kernel="made", grid=1, block=32, read_requests=4000, read_sectors=16000, instructions=1000)
    seconds = [predict_launch(A100, one, Code(loads=4, waits=waits)).seconds for waits in (1, 2, 4)]
    assert seconds[1] - seconds[0] == pytest.approx(1000 * A100.latency_l2 / A100.clock, rel=0.01)
    assert seconds[2] - seconds[1] == pytest.approx(2000 * A100.latency_l2 / A100.clock, rel=0.01)
    # 9 warps a scheduler have 9 times 32 clocks of products in a turn, more than a load takes.
    loading = replace(product_launch(108 * 9), read_requests=108 * 9 * 4 * 250, read_sectors=108 * 9 * 1000)
    hidden, none = Code(registers=32, tensor=4, loads=1, waits=1), Code(registers=32, tensor=4)
    with_loads, without = (predict_launch(A100, loading, code).seconds for code in (hidden, none))
    assert with_loads == pytest.approx(without, rel=0.02)


def test_warps_that_read_ahead_are_bound_by_the_busiest_unit_alone():
    launch, code = product_of_ampere(8192)
    slow, fast = (predict_launch(A100, launch, replace(code, reads_ahead=ahead)) for ahead in (False, True))
    assert max(slow.terms.values()) < fast.seconds < 0.9 * slow.seconds


def test_the_busiest_multiprocessor_decides():
    launch, code = product_of_ampere(8192)
    even, uneven = (predict_launch(A100, replace(launch, busiest=busiest), code) for busiest in (1, 1.25))
    assert uneven.seconds == pytest.approx(1.25 * even.seconds, rel=0.01)
    assert uneven.terms == even.terms


def test_small_data_stay_in_the_second_level_cache():
    def rate(size):
        return 2 * size / (predict_launch(H100, *copy(size)).seconds - H100.launch)

    assert rate(1 << 30) == pytest.approx(H100.dram * H100.copy_share, rel=0.05)
    assert rate(10 << 20) > H100.dram


def test_eager_products_and_passes():
    large = predict_eager(H100, [Product(8192, 8192, 8192, "bfloat16", 2)])
    assert PRODUCT / large == pytest.approx(807e12, rel=0.1)
    # 12 x 11 tiles are one wave of 132 multiprocessors, 12 x 12 are two.
    one, two = (predict_eager(H100, [Product(12 * 128, n, 8192, "bfloat16", 2)]) for n in (11 * 128, 11 * 128 + 1))
    assert two - H100.launch == pytest.approx(2 * (one - H100.launch))
    assert predict_eager(H100, [Sweep(0, kernels=3)]) == pytest.approx(3 * H100.launch)
    assert predict_eager(H100, [Sweep(1e9)]) == pytest.approx(1e9 / (0.87 * 3.352e12), rel=0.01)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_peaks_are_those_of_the_datasheets(machine):
    published = {
        "A100": (312e12, 156e12, 19.5e12),
        "H100": (989e12, 495e12, None),
        "H200": (989e12, 495e12, None),
        "RTX 4090": (165e12, 82.6e12, 82.6e12),
        "RTX 5090": (209.5e12, 104.8e12, 104.8e12),
    }[machine.name]
    for math, peak in zip(("bfloat16", "tf32", "float32"), published, strict=True):
        assert peak is None or machine.peak(math) == pytest.approx(peak, rel=0.01)


# --- Counts, and the benchmark's problems ---

REGENERATE = (
    "python python/benchmarks/cuda_traffic.py --out python/benchmarks/cuda_counts.json "
    "with a module built with -DCPC_EXT_TRACE=ON (CONTRIBUTING.md)"
)


@pytest.fixture(scope="module")
def traced():
    """The committed counts."""
    return load(COUNTS)


def test_counts_come_back_as_they_were_saved(tmp_path):
    first, second = product_launch(3), product_launch(4)
    of_products = Problem(
        op="op",
        label="[1]",
        dtype="bfloat16",
        passes="forward",
        source="traced",
        minimum_bytes=12.0,
        math="bfloat16",
        launches=(first, second, first),
    )
    problems = [of_products, replace(of_products, label="[2]", launches=(second,))]
    path = tmp_path / "counts.json"
    save(path, problems)
    assert load(path) == problems
    text = path.read_text()
    assert text.count('"grid"') == 3  # The same launch is there once,
    assert "float32" not in text  # and no default is.
    assert "shared" not in text
    save(path, [replace(of_products, launches=(replace(first, accesses=2.6),))])
    assert load(path)[0].launches[0].accesses == 3
    path.write_text(text.replace('"grid"', '"grids"'))
    with pytest.raises(TypeError, match="grids"):
        load(path)


def test_every_benchmark_case_has_counts(traced):
    keys = [problem.key for problem in traced]
    assert len(keys) == len(set(keys))
    missing, gone = cases_by_key().keys() - set(keys), set(keys) - cases_by_key().keys()
    assert not missing | gone, f"not counted: {missing}; no case any more: {gone}; run {REGENERATE}"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_counted_kernel_has_a_line_of_machine_code(traced, machine):
    kernels = {launch.kernel for problem in traced for launch in problem.launches}
    assert all("::" in kernel for kernel in kernels)
    gone = {kernel for kernel in kernels if (machine.sm, kernel) not in cuda_model._codes()}
    assert not gone, f"not in python/machine_code.csv: {gone}; if it is up to date, run {REGENERATE}"


def test_every_estimate_of_instructions_is_of_a_counted_kernel(traced):
    kernels = {launch.kernel for problem in traced for launch in problem.launches}
    assert all(fnmatch.filter(kernels, pattern) for pattern in INSTRUCTIONS)


def test_instructions_where_the_main_loop_does_not_tell():
    staged = Launch(
        kernel="logistic_mixture::run_tiles<float, 3, 1>",
        grid=2,
        block=64,
        read_requests=40,
        write_requests=20,
        shared_requests=100,
        transcendentals=4 * 32 * 10,
    )
    assert turns_of(staged, Code(loop=100, loads=5)).instructions == 6.5 * 40 + 17 * 10 + OTHER_INSTRUCTIONS
    assert turns_of(replace(staged, instructions=12), Code(loop=100, loads=5)).instructions == 3
    # Two loads a warp and turn: so often through the loop.
    assert turns_of(replace(staged, kernel="op::other"), Code(loop=100, loads=5)).instructions == 2 * 100 + 300


def test_our_kernels_multiply_at_least_what_they_must(traced):
    for problem in traced:
        multiplied = sum(
            sum(count * cuda_model.flops_of(name) for name, count in launch.mma.items())
            + 2 * sum(launch.multiplies.values())
            for launch in problem.launches
        )
        # Taps that fall on the padding count in the minimum, and are left out.
        assert multiplied >= 0.6 * problem.minimum_flops, problem.key
        if problem.op == "info_nce_all":
            # Blocks that stay have unequal shares, and four of them were watched.
            assert multiplied >= 0.97 * problem.minimum_flops, problem.key


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_problem_is_predicted_and_no_faster_than_its_floor(traced, machine):
    for problem in traced:
        row = predict(machine, completed(problem), eager_steps(problem.key))
        # Taps that fall on the padding count in the floor, and are left out: at most 16 % of those of 7 x 7 pixels.
        share = 0.84 if "conv2d" in problem.op else 1
        assert share * row.floor < row.ours < 1, problem.key
        assert problem.op == "augment_patches" if row.eager is None else row.eager > 0


def test_what_pytorch_launches_around_our_kernels_is_added(traced):
    sampled = next(each for each in traced if each.op == "info_nce_sampled" and "backward" in each.passes)
    names = [launch.kernel for launch in completed(sampled).launches]
    assert names[: len(sampled.launches)] == [launch.kernel for launch in sampled.launches]
    assert names.count("PyTorch's product with a scalar") == 2  # Of the gradients of queries and of keys.
    assert predict(H100, completed(sampled)).ours > predict(H100, sampled).ours + 3 * H100.launch
    for key in cases_by_key():
        assert not any("::" in launch.kernel for launch in surrounding_launches(key))


RESULT = {"op": "op", "label": "label", "dtype": "float32", "passes": "forward", "compared": "ours"}


def test_predictions_are_confronted_with_measurements():
    def result(label, ours, eager):
        seconds = {"ours": {"seconds": {"median": ours}}, "eager": {"seconds": {"median": eager}}}
        return {**RESULT, "label": label, "alternatives": seconds}

    def problem(label):
        return Problem(op="op", label=label, dtype="float32", passes="forward", source="traced", minimum_bytes=1)

    rows = [
        replace(predict(H100, problem(label), []), ours=4e-5, eager=6e-5) for label in ("small", "large", "unmeasured")
    ]
    lines = confront(rows, {"results": [result("small", 1e-5, 2e-5), result("large", 8e-5, 4e-5)]})
    assert "predicted" in lines[0]
    assert len(lines) == 4
    assert lines[1].split()[-6:] == ["40.0", "10.0", "host", "60.0", "20.0", "host"]
    assert lines[2].split()[-6:] == ["40.0", "80.0", "0.50", "60.0", "40.0", "1.50"]
    assert lines[3].endswith("ours 0.50 of 1, eager 1.50 of 1")


def test_the_program_says_predicted(tmp_path, monkeypatch, capsys):
    out = tmp_path / "predicted.json"
    options = ["--op", "info_nce_all", "--machine", "A100", "--kernels", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["cuda_model.py", *options])
    cuda_model.main(cuda_model.parse_arguments())
    printed = capsys.readouterr().out
    assert "A100: predicted microseconds" in printed
    assert "info_nce::multiply<SplitTf32, " in printed
    assert "PyTorch's product with a scalar" in printed
    document = json.loads(out.read_text())
    assert document["what"].startswith("predicted")
    assert {result["machine"] for result in document["results"]} == {"A100"}
    assert all(result["predicted"]["ours"] > result["predicted"]["floor"] for result in document["results"])


def test_ops_and_files_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda_model.py", "--op", "info_nce_all", "foo"])
    with pytest.raises(SystemExit, match="--op: no counts of foo in "):
        cuda_model.main(cuda_model.parse_arguments())
    for option in ("--against", "--counts"):
        monkeypatch.setattr(sys, "argv", ["cuda_model.py", option, str(tmp_path / "none.json")])
        with pytest.raises(SystemExit):
            cuda_model.parse_arguments()
        assert f"{option}: there is no file {tmp_path / 'none.json'}" in capsys.readouterr().err


def test_predictions_of_one_gpu_are_not_put_beside_times_of_another(tmp_path, monkeypatch, capsys):
    measured = tmp_path / "kernels.json"
    measured.write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "results": []}))
    monkeypatch.setattr(sys, "argv", ["cuda_model.py", "--against", str(measured)])
    with pytest.raises(SystemExit):
        cuda_model.parse_arguments()
    assert f"--against: {measured} is of NVIDIA H200, and --machine H100 another" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cuda_model.py", "--machine", "H200", "H100", "--against", str(measured)])
    assert cuda_model.parse_arguments().against == measured


def test_workspaces_are_filled_before_some_blocks_are_traced(monkeypatch):
    # Otherwise counts would depend on old memory: kernels skip loads where a weight of another block is zero.
    for name in ("CPC_EMULATION_SHARED_KIB", "CPC_EMULATION_MULTIPROCESSORS"):
        monkeypatch.setenv(name, os.environ.get(name, "132"))  # The program sets them for good.
    cuda_traffic = importlib.import_module("cuda_traffic")
    workspace, values = torch.zeros(64, dtype=torch.uint8), torch.zeros(64)
    monkeypatch.setattr(cuda_traffic, "native", SimpleNamespace(op=lambda *tensors: [each.clone() for each in tensors]))
    seen = cuda_traffic._Recorder().op(values, workspace)
    assert not seen[0].any()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (seen[1].view(dtype) > 0.01).all()
        assert (seen[1].view(dtype) < 2).all()
