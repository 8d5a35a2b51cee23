"""Runs of several processes: equality with one process, resumption with another number, and the end if one dies."""

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

from cpc_ext.programs import training as program
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.distribution import Ranks, joined_ranks, lost_contact
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loop import Trainer
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics

PATIENCE_SECONDS = 60
CASES = (
    "cpc-sampled-gather",
    "cpc-all-gather",
    "cpc-all-ring",
    "cpc_v2-gather",
    "cpc_v2-ring",
    "simclr-gather",
    "simclr-ring",
    "supcon-gather",
    "contrast-gather",
    "contrast-ring",
    "chunks",
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module", params=[2, 3])
def differences(request, start, tmp_path_factory) -> dict[str, dict[str, float]]:
    """Differences of losses and gradients between several processes and one, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    world = request.param
    processes = [
        start(Path(__file__).with_name("rank_program.py"), rank, world, folder / "meeting", folder / "answer")
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)
    return json.loads((folder / "answer").read_text())


@pytest.mark.parametrize("case", CASES)
def test_processes_have_the_loss_and_gradients_of_one(differences, case):
    found = differences[case]
    assert found.pop("largest_gradient") > 1e-3
    own = {"contrast": {"accuracy"}, "supcon": {"accuracy"}, "chunks": set()}.get(
        case.partition("-")[0], {"accuracy", "mutual_information"}
    )
    assert set(found) >= {"loss", "gradients"} | own
    assert max(found.values()) < 1e-10, found


@pytest.fixture
def options(tmp_path) -> list[str]:
    """Options of a run on a folder of noise without labels, which takes milliseconds for each step."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    return [
        *("--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--image-size", "24", "--crop", "24"),
        *("--grid-size", "5", "--encoder", "resnet-small", "--pred-steps", "2", "--batch-size", "6", "--device", "cpu"),
        *("--precision", "fp32", "--log-every", "1", "--checkpoint-every", "1", "--schedule", "constant"),
        *("--warmup-steps", "0", "--lr", "1e-4", "--neg-samples", "16"),
        # Each process has batch norm of its own, and one of the transforms mixes in a patch that another may have.
        *("--patch-size", "8", "--norm", "layer", "--no-patch-augmentation"),
    ]


def test_a_dead_process_ends_the_others_and_the_run_goes_on_with_another_number(start, options, tmp_path, monkeypatch):
    cache = {"CPC_EXT_CACHE": str(tmp_path / "cache")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = tmp_path / "several"
    main, other = (
        start(
            *("-m", "cpc_ext.train", "--out-dir", run, *options, "--steps", "100000"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **cache,
        )
        for rank in range(2)
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_metrics(run / "metrics.jsonl")) < 4 and time.monotonic() < deadline and main.poll() is None:
        time.sleep(0.01)
    other.kill()
    output = main.communicate(timeout=PATIENCE_SECONDS)[0]
    assert main.returncode == 1, output
    assert "[rank 0] error: another process of this run has ended" in output
    assert f"--resume --out-dir {run}" in output
    assert "Traceback" not in output
    reached = load_checkpoint(run / "checkpoint.pt")["step"]
    assert reached >= 3

    steps = reached + 3
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "cpc_ext.train")
    resumed = start(*torchrun, "--resume", "--out-dir", run, "--steps", steps, **cache)
    output = resumed.communicate(timeout=PATIENCE_SECONDS)[0]
    assert resumed.returncode == 0, output
    assert output.count("3 processes, going on after step") == 1  # One speaks for all.
    assert json.loads((run / "summary.json").read_text())["processes"] == 3

    monkeypatch.setenv("CPC_EXT_CACHE", cache["CPC_EXT_CACHE"])
    assert program.main(["--out-dir", str(tmp_path / "one"), *options, "--steps", str(steps)]) == 0
    several, one = (read_metrics(path / "metrics.jsonl") for path in (run, tmp_path / "one"))
    assert [record["step"] for record in several] == list(range(1, steps + 1))
    for mine, theirs in zip(several, one, strict=True):
        # Sums in another order make differences that grow with the updates.
        tolerance = 1e-6 if mine["step"] <= 3 else 1e-3
        for name in ("loss", "mutual_information", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (mine["step"], name)


def test_batch_that_processes_cannot_share(tiny_dataset, tmp_path):
    config = parse(["--batch-size", "5", "--crop", "28", "--device", "cpu", "--precision", "fp32"]).run
    task = CPCv1Task(config, tiny_dataset, torch.device("cpu"))
    with pytest.raises(TrainingError, match="--batch-size: expected a multiple of the 2 processes, got 5"):
        Trainer(task, config, RunDir(tmp_path), Ranks(torch.device("cpu"), rank=1, world_size=2))


@pytest.mark.parametrize("device", ["mps", "cuda:0"])
def test_devices_that_processes_cannot_share(monkeypatch, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(TrainingError, match=f"several processes compute on cpu or cuda, got {device}"),
        joined_ranks(device),
    ):
        pass


def test_ring_needs_all_negatives(capsys):
    with pytest.raises(SystemExit):
        parse(["--gather-negatives", "ring", "--neg-samples", "16"])
    assert "--gather-negatives ring needs --neg-samples all" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40832",
            True,
        ),
        ("Connection reset by peer", True),
        ("NCCL communicator was aborted on rank 0", True),
        ("The queue could not be restored: sizes of stored keys differ, timeouts aside", False),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
    ],
)
def test_errors_that_tell_of_another_process(monkeypatch, said, lost):
    """Others are faults of this one, which are to be seen."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lost_contact(RuntimeError(said)) == lost
    assert lost_contact(torch.distributed.DistStoreError("wait timeout"))
    assert not lost_contact(ValueError(said))
