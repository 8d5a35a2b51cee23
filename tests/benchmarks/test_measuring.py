"""How benchmarks measure: memory, timing, cases, and that our input is what training feeds its model."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import speech_steps
import torch
from benchmark import Case, Op, Problem, measure
from greedy_memory import GRID, make_model, modules_in_turn
from memory import peak_extra_bytes
from ops import all_ops
from step_stages import StageClock
from timing import Plan, interleaved, make_plan
from training import GRAY_MEAN, GRAY_STD, OurInput, native_dtype

from cpc_ext.data import ImageFetcher, ImageSet, PatchView
from cpc_ext.models import CPC, GatedPixelCNNContext, ResNetV2Encoder
from cpc_ext.training.precision import default_precision, patch_dtype


def test_peak_memory_counts_what_lives_at_once():
    kept = torch.empty(1000)

    def call():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(3 << 20, dtype=torch.uint8)
        return torch.empty(1 << 19, dtype=torch.uint8), len(second)

    assert peak_extra_bytes(call, "cpu") == (3 << 20) + (1 << 19)
    assert peak_extra_bytes(lambda: kept.add_(1), "cpu") < 100


def test_every_alternative_is_called_as_planned():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    alternatives = {name: lambda name=name: count(name) for name in calls}
    assert make_plan(alternatives, repeats=20, seconds=10, device="cpu") == Plan(20, 3, {"a": 3, "b": 3})
    assert make_plan(alternatives, repeats=20, seconds=0, device="cpu").repeats == 5
    calls.update(a=0, b=0)
    times = interleaved(alternatives, repeats=4, warmup=1, untimed={"a": 2, "b": 0})
    assert calls == {"a": 15, "b": 5}
    assert times["a"].low <= times["a"].median <= times["a"].high


class TinyCase(Case):
    label = "tiny"
    size = 1


def tiny_op(**alternatives):
    calls = {"eager": lambda: torch.ones(100), "ours": lambda: torch.ones(100), **alternatives}
    return Op("tiny", "memory", "things", [TinyCase()], lambda case, device: Problem(calls, 400))


def fail():
    raise RuntimeError("no compiler\nat all")


def test_an_alternative_that_cannot_run_is_named():
    row = measure(tiny_op(compiled=fail), TinyCase(), "cpu", 2)
    assert row["failed"] == {"compiled": "RuntimeError: no compiler"}
    assert set(row["alternatives"]) == {"eager", "ours"}
    assert row["alternatives"]["ours"]["peak_extra_bytes"] == 400


def test_an_alternative_that_is_not_asked_for_is_not_called():
    row = measure(tiny_op(compiled=fail), TinyCase(), "cpu", 2, without=["compiled"])
    assert (row["failed"], row["fair"]) == ({}, "eager")


def test_ours_must_run_and_agree():
    with pytest.raises(RuntimeError, match="no compiler"):
        measure(tiny_op(ours=fail), TinyCase(), "cpu", 2)
    with pytest.raises(AssertionError, match="result 0 of ours is "):
        measure(tiny_op(ours=lambda: torch.zeros(100)), TinyCase(), "cpu", 2)


def test_every_op_has_a_curve_and_quick_cases():
    for op in all_ops().values():
        swept = {case.size for case in op.cases if case.sweep}
        assert len(swept) > 3
        assert any(case.quick for case in op.cases)


def test_our_input_is_that_of_training():
    pixels = torch.randint(0, 256, (5, 3, 96, 96), dtype=torch.uint8)
    indices = torch.tensor([4, 0, 0, 2])
    ours = OurInput(pixels, torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(3))(indices)
    view = PatchView(
        16, 8, crop=64, gray=True, mean=(GRAY_MEAN,), std=(GRAY_STD,), dtype=torch.bfloat16, channels_last=True
    )
    fetch = ImageFetcher(ImageSet(pixels.numpy()))
    theirs = view.random(fetch(np.asarray(indices)), torch.Generator().manual_seed(3))
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()
    assert native_dtype(torch.device("cpu")) == patch_dtype(default_precision("cpu"))


def test_the_stages_of_a_step_add_up():
    encoder = ResNetV2Encoder(blocks=(1,), channels=(8,), stem_channels=8, in_channels=1)
    model = CPC(encoder, GatedPixelCNNContext(8, 2), pred_steps=2, neg_samples=4)
    optimizer = torch.optim.Adam(model.parameters())
    clock = StageClock(model, torch.device("cpu"))
    for _ in range(2):
        clock.step(optimizer, lambda: torch.randn(2, 5, 5, 1, 8, 8), lambda patches: model(patches).loss)
    medians = clock.medians()
    both = ["forward", "backward"]
    expected = {"input": ["forward"], "encoder": both, "context": both, "loss": both, "optimizer": ["update"]}
    assert {stage: list(passes) for stage, passes in medians.items()} == expected
    assert all(seconds > 0 for passes in medians.values() for seconds in passes.values())


BLOCKED = ("pydantic", "tyro", "matplotlib", "tqdm", "tensorboard", "yaml", "platformdirs", "safetensors", "PIL")


@pytest.mark.parametrize("program", ["kernels", "training", "gpu_report"])
def test_programs_need_only_pytorch(program):
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); sys.path[:] = {sys.path!r}; import {program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "options", "least"),
    [
        ("kernels", "--repeats 1", 2),
        ("training", "--batch-size 0", 1),
        ("greedy_memory", "--batch-size 0", 1),
        ("sampling", "--images 0", 1),
        ("vision_steps", "--repeats 0", 2),
        ("vision_steps", "--repeats -1", 2),
        ("cpc_steps", "--repeats 1", 2),
        ("cpc_steps", "--dim 0", 1),
        ("contrastive_losses", "--repeats 0", 2),
        ("speech_steps", "--repeats 1", 2),
        ("oversubscription", "--processes 0", 1),
        ("cuda_sampling", "--images 16 0", 1),
    ],
)
def test_numbers_that_nothing_can_be_measured_with(program, options, least, monkeypatch, capsys):
    option, *_, number = options.split()
    assert (
        refused(program, options, monkeypatch, capsys) == f"argument {option}: expected at least {least}, got {number}"
    )


def refused(program, options, monkeypatch, capsys):
    """Return a program's error message for arguments that it refuses."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *options.split()])
    module = importlib.import_module(program)
    with pytest.raises(SystemExit) as ended:
        getattr(module, "parse_arguments", module.main)()
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("device", "reason"), [("gpu", "expected a name like cpu, cuda or cuda:1"), ("cuda:99", "is not available here")]
)
def test_devices_that_are_not_there(device, reason, monkeypatch, capsys):
    assert reason in refused("kernels", f"--device {device}", monkeypatch, capsys)


@pytest.mark.parametrize(("options", "windows", "repeats"), [("--quick", 2, 2), ("--repeats 4 --batch-size 3", 3, 4)])
def test_steps_on_speech_are_as_many_as_asked_for(options, windows, repeats, monkeypatch, capsys):
    batches = []

    class Model(torch.nn.Linear):
        def forward(self, waveforms):
            batches.append(len(waveforms))
            return super().forward(waveforms[..., :4]).mean()

    monkeypatch.setattr(speech_steps, "CASES", {"tiny": [lambda: Model(4, 1)] * 3})
    monkeypatch.setattr(sys, "argv", ["speech_steps.py", "--device", "cpu", *options.split()])
    speech_steps.main(speech_steps.parse_arguments())
    models = capsys.readouterr().out.count("x ours")
    # A round before those that are timed, and a step whose memory is measured.
    assert batches == [windows] * models * (repeats + 2)


def test_greedy_memory_of_modules_in_turn():
    """A module's activations are gone when the next runs: the peak is near that of the largest module alone."""
    model = make_model({"blocks": (4, 4, 4), "channels": (16, 32, 64), "stem_channels": 16, "in_channels": 1}, 3, "cpu")
    patches = torch.randn(2, GRID, GRID, 1, 16, 16)
    peaks = {
        "kept": peak_extra_bytes(lambda: sum(output.loss for output in model(patches)).backward(), "cpu"),
        "in turn": peak_extra_bytes(lambda: modules_in_turn(model, patches), "cpu"),
        "first": peak_extra_bytes(lambda: next(model.outputs(patches)).loss.backward(), "cpu"),
    }
    assert peaks["in turn"] < 1.05 * peaks["first"]
    # If the later stacks run on our convolution kernel, they store no ReLU outputs, and so less than the first stack.
    assert peaks["in turn"] < 0.85 * peaks["kept"]
