"""Runs of Greedy InfoMax: all modules at once, one after another, from cached outputs, and as a process pipeline."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpc_ext.data import Dataset, ImageSet
from cpc_ext.programs import training as program
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks.greedy_infomax.output_cache import OutputCache
from cpc_ext.tasks.greedy_infomax.task import GreedyTask
from cpc_ext.training import time_budget
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loop import Trainer
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from tests.tasks.test_every_option import task_of
from tests.training.conftest import PATCHES, SHORT, SMALL
from tests.training.test_time_budget import WITHOUT_LENGTH

PATIENCE_SECONDS = 90
GREEDY = ("--model", "greedy-infomax", "--warmup-steps", "0", "--schedule", "constant")


@pytest.fixture
def greedy(monkeypatch, train_fully) -> Callable[..., int]:
    """A function that makes a run without probe and figures."""
    monkeypatch.setattr(GreedyTask, "evaluate", lambda task: {})
    monkeypatch.setattr(GreedyTask, "save", lambda task, run: None)
    return lambda *options: train_fully(*GREEDY, *options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoint.pt")["model"]


def of_module(state: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Return the weights of one module of an encoder that is divided at its stacks."""
    prefixes = [f"encoder.layers.{index}.", f"objectives.{index}.", *(["encoder.conv1."] if index == 0 else [])]
    return {name: value for name, value in state.items() if name.startswith(tuple(prefixes))}


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert mine.keys() == theirs.keys()
    assert len(mine) > 0
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_a_run_and_its_files(train_fully, tmp_path):
    assert train_fully(*GREEDY, "--out-dir", tmp_path) == 0
    assert {"curves.png", "inputs.png", "encoder.safetensors", "summary.json"} <= {f.name for f in tmp_path.iterdir()}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 <= summary["probe_accuracy"] <= 1
    assert summary["chance_accuracy"] == 0.1
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    for name in ("loss", "accuracy", "mutual_information", "grad_norm"):
        parts = [last[f"{name}_module_{index}"] for index in range(3)]
        assert last[name] == pytest.approx(sum(parts) / 3)


@pytest.mark.parametrize("options", [(), ("--clip-grad", "0.01"), ("--precision", "bf16"), ("--norm", "batch")])
def test_modules_do_not_depend_on_each_other(greedy, tmp_path, options):
    """The first module's weights are the same whether or not others learn; clipping is each one's own."""
    assert greedy("--out-dir", tmp_path / "all", *options) == 0
    assert greedy("--out-dir", tmp_path / "first", "--train-module", "0", *options) == 0
    together, alone = weights(tmp_path / "all"), weights(tmp_path / "first")
    assert_equal(of_module(together, 0), of_module(alone, 0))
    assert not torch.equal(together["objectives.1.weight"], alone["objectives.1.weight"])


@pytest.mark.parametrize("options", [("--modules", "1"), ("--modules", "2"), ("--split-at", "1"), ("--norm", "layer")])
@pytest.mark.parametrize("objective", ["infonce", "supervised"])
def test_variants_learn(greedy, train_with, tmp_path, options, objective):
    options = ("--out-dir", tmp_path, "--objective", objective, "--steps", "3", *options)
    if objective == "infonce":
        assert greedy(*options) == 0
    else:
        assert train_with(*GREEDY[:2], *SMALL, *PATCHES, *SHORT, *options) == 0
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert np.isfinite(last["loss"])
    assert ("mutual_information" in last) == (objective == "infonce")
    trained = weights(tmp_path)
    config = parse(["--config", str(tmp_path / "config.yaml")]).run
    assert any(name.startswith("context.") for name in trained) == (objective == "infonce" and config.greedy.count == 1)


def test_delta_orthogonal_start(greedy, tmp_path):
    assert greedy("--out-dir", tmp_path, "--init", "delta-orthogonal", "--steps", "1", "--lr", "1e-8") == 0
    weight = weights(tmp_path)["encoder.layers.1.0.conv2.weight"]
    middle = weight[:, :, 1, 1]
    torch.testing.assert_close(middle @ middle.T, 2 * torch.eye(len(middle)), atol=1e-4, rtol=0)
    assert weight[:, :, 0].abs().max() < 1e-6


def test_one_after_another(greedy, tmp_path):
    first, second, third = (tmp_path / name for name in "012")
    assert greedy("--out-dir", first, "--train-module", "0") == 0
    assert greedy("--out-dir", second, "--train-module", "1", "--resume-from", first) == 0
    assert greedy("--out-dir", third, "--train-module", "2", "--resume-from", second) == 0
    states = [weights(run) for run in (first, second, third)]
    assert_equal(
        of_module(states[0], 0),
        of_module(states[2], 0)
        | {name: value for name, value in of_module(states[0], 0).items() if name.startswith("objectives")},
    )
    encoder_of_second = {n: v for n, v in of_module(states[1], 1).items() if n.startswith("encoder")}
    assert_equal(encoder_of_second, {name: states[2][name] for name in encoder_of_second})
    initial = load_checkpoint(first / "checkpoint.pt")["model"]
    assert not torch.equal(states[2]["encoder.layers.2.0.conv1.weight"], initial["encoder.layers.2.0.conv1.weight"])


def test_a_frozen_run_resumes_without_the_one_it_began_with(greedy, tmp_path):
    assert greedy("--out-dir", tmp_path / "first", "--train-module", "0") == 0
    options = ("--train-module", "1", "--resume-from", tmp_path / "first")
    assert greedy("--out-dir", tmp_path / "whole", *options, "--steps", "8") == 0
    assert greedy("--out-dir", tmp_path / "parts", *options, "--steps", "4") == 0
    (tmp_path / "first").rename(tmp_path / "gone")
    assert program.main(["--resume", "--out-dir", str(tmp_path / "parts"), "--steps", "8"]) == 0
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_runs_resume_bit_for_bit(greedy, tmp_path):
    assert greedy("--out-dir", tmp_path / "whole", "--steps", "8") == 0
    assert greedy("--out-dir", tmp_path / "parts", "--steps", "4") == 0
    assert program.main(["--resume", "--out-dir", str(tmp_path / "parts"), "--steps", "8"]) == 0
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert_equal(parts["model"], whole["model"])
    assert len(whole["optimizer"]) == 3
    for one, other in zip(whole["optimizer"], parts["optimizer"], strict=True):
        for left, right in zip(one["state"].values(), other["state"].values(), strict=True):
            assert torch.equal(left["exp_avg_sq"], right["exp_avg_sq"])


def test_cached_outputs(greedy, tmp_path):
    """With crops that leave no choice, training from the disk is training as without it."""
    fixed = ("--crop", "32", "--grid-size", "7", "--no-flip", "--lr", "1e-4")
    assert greedy("--out-dir", tmp_path / "first", "--train-module", "0", *fixed) == 0
    options = ("--train-module", "1", "--resume-from", tmp_path / "first", *fixed)
    cached = ("--cache-outputs", tmp_path / "cache")
    assert greedy("--out-dir", tmp_path / "live", *options) == 0
    assert greedy("--out-dir", tmp_path / "cached", *options, *cached) == 0
    assert_equal(weights(tmp_path / "cached"), weights(tmp_path / "live"), tolerance=2e-5)

    file = tmp_path / "cache" / "module-0.bin"
    assert {path.name for path in file.parent.iterdir()} == {file.name, f".{file.name}.lock"}
    written = file.stat().st_mtime_ns
    assert greedy("--out-dir", tmp_path / "again", *options, *cached) == 0
    assert file.stat().st_mtime_ns == written
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "cached"))
    # A file from other weights, or an incomplete one, is computed again.
    assert greedy("--out-dir", tmp_path / "other", "--train-module", "0", *fixed, "--seed", "1") == 0
    others = ("--train-module", "1", "--resume-from", tmp_path / "other", *fixed, *cached)
    assert greedy("--out-dir", tmp_path / "stale", *others) == 0
    assert file.stat().st_mtime_ns > written
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert greedy("--out-dir", tmp_path / "cut", *others) == 0
    assert file.read_bytes() == content


@pytest.mark.parametrize("resumed", [False, True])
def test_a_time_budget_is_measured_on_the_outputs_that_the_run_has(greedy, train_with, tmp_path, monkeypatch, resumed):
    """The cache of a run is of its weights, also while its pace is measured, so that it is filled once for all."""
    monkeypatch.setattr(time_budget, "_SHORTEST", 0.05)
    assert greedy("--out-dir", tmp_path / "first", "--train-module", "0") == 0
    cached = ("--train-module", "1", "--resume-from", tmp_path / "first", "--cache-outputs", tmp_path / "cache")
    assert greedy("--out-dir", tmp_path / "second", *cached) == 0
    written = (tmp_path / "cache" / "module-0.bin").stat().st_mtime_ns
    budget = ("--time-budget", "0.02", "--no-evaluate")
    if resumed:
        assert train_with("--resume", "--out-dir", tmp_path / "second", *budget) == 0
    else:
        assert train_with(*GREEDY, *WITHOUT_LENGTH, "--out-dir", tmp_path / "third", *cached, *budget) == 0
    assert (tmp_path / "cache" / "module-0.bin").stat().st_mtime_ns == written


def test_cached_views(tmp_path):
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8), labels=np.arange(7))
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    path = tmp_path / "outputs.bin"

    def outputs(batch: torch.Tensor) -> torch.Tensor:
        means = batch.float().mean((1, 2, 3))[:, None]
        return (means + torch.randint(3, (len(batch), 1), generator=generator) / 4).bfloat16()

    OutputCache.fill(path, "key", images, outputs, device, views=5)
    streams = RandomStreams(0, device)
    fetch = OutputCache(path, "key", images, device, streams)
    indices = np.array([6, 0, 3])
    means = torch.from_numpy(images.images[indices]).float().mean((1, 2, 3))
    drawn = torch.cat([fetch(indices).float() - means[:, None] for _ in range(20)])
    assert fetch(indices).dtype == torch.bfloat16
    assert drawn.abs().max() < 1.5
    assert len(drawn.unique()) > 3
    assert fetch.labels(indices).tolist() == [6, 0, 3]
    with pytest.raises(TrainingError, match="was changed by another run"):
        OutputCache(path, "another", images, device, streams)


def test_outputs_are_of_all_images_weights_and_options(tmp_path):
    """Also of an image among hundreds, and of the precision that they were computed in."""
    images = np.random.default_rng(0).integers(0, 256, (600, 3, 24, 24), dtype=np.uint8)

    def key(images=images, value=0.5, folder="cache", **options):
        given = {"train_module": 1, "modules": 3, "resume_from": "run", "cache_outputs": tmp_path / folder, **options}
        task = task_of("greedy-infomax", images, **given)
        with torch.no_grad():
            for module, weight in zip(task.model.encoder_modules, (value, 2.0, 3.0), strict=True):
                for parameter in module.parameters():
                    parameter.fill_(weight)
        return task.inputs._cache_key()

    changed = images.copy()
    changed[301, 1, 2, 3] ^= 1
    keys = [key(), key(changed), key(images[:599]), key(value=0.25), key(cache_views=3), key(seed=1)]
    keys += [key(precision="bf16"), key(flip=True)]
    assert len(set(keys)) == len(keys)
    # Modules that are not frozen, and where the file is, decide nothing.
    assert key(images.copy(), folder="other") == keys[0]


def test_cache_needs_room(monkeypatch, greedy, tmp_path, capsys):
    assert greedy("--out-dir", tmp_path / "first", "--train-module", "0") == 0
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("cpc_ext.tasks.greedy_infomax.output_cache.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(RunDir, "check_space", lambda *arguments: None)
    options = ("--train-module", "1", "--resume-from", tmp_path / "first", "--cache-outputs", tmp_path / "cache")
    assert greedy("--out-dir", tmp_path / "second", *options) == 1
    assert "MiB left, the outputs need" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".module-0.bin.lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-module", "3"], "--train-module 3: there are 3 modules, counted from 0"),
        (["--train-module", "1"], "--train-module 1 needs --resume-from"),
        (["--cache-outputs", "x"], "--cache-outputs needs --train-module 1 or higher"),
        (["--pipeline", "--modules", "1"], "--pipeline trains several modules at a time"),
        (["--pipeline", "--train-module", "0"], "--pipeline trains several modules at a time"),
        (["--modules", "0"], "--modules: input should be greater than or equal to 1, got 0"),
        (["--objective", "labels"], "'labels' for argument '--objective'"),
    ],
)
def test_wrong_options(capsys, options, message):
    with pytest.raises(SystemExit):
        parse(["--model", "greedy-infomax", "--device", "cpu", *options])
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--modules", "4"), "modules must be 1 to 3, the stacks of the encoder, got 4"),
        (("--split-at", "2", "1"), "modules must begin with rising blocks"),
        (("--encoder", "mobilenetv2", "--init", "delta-orthogonal"), "--init delta-orthogonal is for ResNets"),
        (("--pipeline",), "--pipeline needs a process for each of 3 modules"),
        (("--train-module", "1", "--resume-from", "nowhere"), "--resume-from: cannot read nowhere/config.yaml"),
    ],
)
def test_runs_that_cannot_start(greedy, tmp_path, capsys, options, message):
    assert greedy("--out-dir", tmp_path, *options) == 1
    assert message in capsys.readouterr().err


def test_runs_that_do_not_fit_each_other(greedy, train, tmp_path, capsys):
    assert greedy("--out-dir", tmp_path / "first", "--train-module", "0") == 0
    assert train("--out-dir", tmp_path / "cpc") == 0
    for run, options, message in (
        (tmp_path / "first", ("--norm", "batch"), "--norm is layer there, batch here"),
        (tmp_path / "first", ("--modules", "2"), "--modules is 3 there, 2 here"),
        (tmp_path / "first", ("--train-module", "2"), "trained module 0; --train-module 2 needs the run that"),
        (tmp_path / "cpc", (), "is a run of cpc-v1, not of --model greedy-infomax"),
    ):
        capsys.readouterr()
        assert greedy("--out-dir", tmp_path / "second", "--train-module", "1", "--resume-from", run, *options) == 1
        assert message in capsys.readouterr().err


def test_supervised_needs_labels(tiny_dataset):
    config = parse(["--model", "greedy-infomax", "--objective", "supervised", "--crop", "28", "--device", "cpu"]).run
    unlabelled = Dataset(**{**vars(tiny_dataset), "train": ImageSet(tiny_dataset.train.images)})
    with pytest.raises(ValueError, match="--objective supervised: the images of textures have no labels"):
        GreedyTask(config, unlabelled, torch.device("cpu"))


def test_divergence_in_one_module_ends_the_run(greedy, tmp_path, capsys):
    assert greedy("--out-dir", tmp_path, "--lr", "10", "--steps", "60", "--norm", "none") == 1
    assert "training diverged" in capsys.readouterr().err


@pytest.fixture
def noise(tmp_path, monkeypatch) -> list[str]:
    """Options of a run on a folder of noise, which takes milliseconds a step."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    return [
        *GREEDY,
        *("--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--image-size", "24", "--crop", "24"),
        *("--grid-size", "5", "--encoder", "resnet-small", "--pred-steps", "2", "--batch-size", "6", "--device", "cpu"),
        *("--precision", "fp32", "--log-every", "2", "--checkpoint-every", "3", "--lr", "1e-3", "--modules", "2"),
        *("--neg-samples", "8"),
        # Each process has batch norm of its own, and one of the transforms mixes in a patch that another may have.
        *("--patch-size", "8", "--norm", "layer", "--no-patch-augmentation"),
    ]


def label(images: Path) -> None:
    """Sort a folder's images into two classes, with three quarters for training and the others for testing."""
    for number, image in enumerate(sorted(images.glob("*.png"))):
        folder = images / ("test" if number % 4 == 3 else "train") / str(number // 12)
        folder.mkdir(parents=True, exist_ok=True)
        image.rename(folder / image.name)


def start_two(start, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(
            *("-m", "cpc_ext.train", *arguments),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]


def test_a_pipeline_is_all_at_once(start, noise, tmp_path):
    """Two processes with a module each end up with what one process with both does, also when one goes on later."""
    label(tmp_path / "images")
    noise += ["--probe-every", "3", "--steps", "7"]
    processes = start_two(start, "--out-dir", tmp_path / "pipeline", *noise, "--pipeline")
    assert program.main(["--out-dir", str(tmp_path / "one"), *noise]) == 0
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    def compare() -> None:
        several, one = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("pipeline", "one"))
        assert_equal(several["model"], one["model"])
        for mine, theirs in zip(several["optimizer"], one["optimizer"], strict=True):
            for left, right in zip(mine["state"].values(), theirs["state"].values(), strict=True):
                assert torch.equal(left["exp_avg"], right["exp_avg"])
        for mine, theirs in zip(
            *(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("pipeline", "one")), strict=True
        ):
            times = ("seconds", "images_per_second")
            assert {k: v for k, v in mine.items() if k not in times} == {
                k: v for k, v in theirs.items() if k not in times
            }

    compare()
    summary = json.loads((tmp_path / "pipeline" / "summary.json").read_text())
    assert summary["processes"] == 2
    # Probes are taken with the weights of all modules.
    assert [step for step, _ in summary["knn_accuracy"]] == [0, 3, 6, 7]
    # The checkpoint knows of losses since the last log line, of all modules.
    resumed = [*("--resume", "--out-dir", str(tmp_path / "pipeline"), "--no-pipeline", "--steps", "10")]
    assert program.main(resumed) == 0
    assert program.main(["--resume", "--out-dir", str(tmp_path / "one"), "--steps", "10"]) == 0
    compare()


def test_processes_that_share_batches_are_one(start, noise, tmp_path):
    """Without --pipeline each process trains all modules on its part of a batch."""
    processes = start_two(start, "--out-dir", tmp_path / "several", *noise, "--steps", "4")
    assert program.main(["--out-dir", str(tmp_path / "one"), *noise, "--steps", "4"]) == 0
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    several, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("several", "one"))
    assert len(several) == 2
    for mine, theirs in zip(several, one, strict=True):
        for name in ("loss", "grad_norm_module_0", "grad_norm_module_1", "loss_module_1", "mutual_information"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_a_dead_process_ends_the_pipeline(start, noise, tmp_path):
    run = tmp_path / "pipeline"
    first, second = start_two(start, "--out-dir", run, *noise, "--pipeline", "--steps", "100000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_metrics(run / "metrics.jsonl")) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.01)
    second.kill()
    output = first.communicate(timeout=PATIENCE_SECONDS)[0]
    assert first.returncode == 1, output
    assert "[rank 0] error: another process of this run has ended" in output
    assert "Traceback" not in output
    assert load_checkpoint(run / "checkpoint.pt")["step"] >= 3


def test_a_stopped_pipeline_saves_and_goes_on(start, noise, tmp_path):
    run = tmp_path / "pipeline"
    processes = start_two(start, "--out-dir", run, *noise, "--pipeline", "--steps", "100000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_metrics(run / "metrics.jsonl")) < 3 and time.monotonic() < deadline and processes[0].poll() is None:
        time.sleep(0.01)
    processes[1].terminate()
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], "\n".join(outputs)
    reached = load_checkpoint(run / "checkpoint.pt")["step"]
    processes = start_two(start, "--out-dir", run, "--resume", "--steps", str(reached + 3))
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert load_checkpoint(run / "checkpoint.pt")["step"] == reached + 3


def test_pipeline_of_another_number_of_processes(tiny_dataset, tmp_path):
    config = parse(["--model", "greedy-infomax", "--pipeline", "--crop", "28", "--device", "cpu"]).run
    task = GreedyTask(config, tiny_dataset, torch.device("cpu"))
    ranks = Ranks(torch.device("cpu"), rank=1, world_size=2, pipeline=True)
    with pytest.raises(TrainingError, match=r"needs a process for each of 3 modules.*--nproc-per-node 3, not with 2"):
        Trainer(task, config, RunDir(tmp_path), ranks)
