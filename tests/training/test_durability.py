"""A run's files after a failed save, a signal, the loss of its folder, or changes of its images."""

from __future__ import annotations

import copy
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpc_ext.programs import convert, evaluate
from cpc_ext.programs import training as program
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.training import distribution, loop, run_data
from cpc_ext.training.checkpoint import load_checkpoint, save_checkpoint
from cpc_ext.training.distribution import Ranks
from tests.training.conftest import SMALL, TINY
from tests.training.test_resume import assert_equal_trees

UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


def steps_in(folder):
    return {name: load_checkpoint(folder / name)["step"] for name in ("checkpoint.pt", "best.pt")}


@pytest.fixture
def in_steps(monkeypatch):
    """A function: after in_steps(action), every forward pass calls action with its number, from 1, and its values."""
    original = CPCv1Task.losses

    def install(action):
        number = 0

        def losses(self, *arguments):
            nonlocal number
            number += 1
            values = original(self, *arguments)
            action(number, values)
            return values

        monkeypatch.setattr(CPCv1Task, "losses", losses)

    return install


@pytest.fixture
def with_losses(in_steps):
    """A function: with_losses(*numbers) sets the losses of the steps, whatever the model computes."""

    def install(*losses):
        def fix(number, values):
            values["loss"] = values["loss"] * 0 + losses[number - 1]

        in_steps(fix)

    return install


@pytest.fixture
def full_disk():
    """A function: after full_disk(True), files cannot grow beyond 1000 bytes, by a real error of the system."""
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, UNLIMITED[1]) if full else UNLIMITED)
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)


# ---- Saving ----


def test_a_run_whose_last_step_cannot_be_saved_is_an_error(train, in_steps, full_disk, tmp_path, capsys):
    in_steps(lambda number, values: full_disk(True) if number == 2 else None)
    assert train("--out-dir", tmp_path) == 1
    full_disk(False)
    error = capsys.readouterr().err
    assert "warning: could not save step 4" in error
    assert "step 8 of 8 could not be saved" in error
    assert (
        f"checkpoint.pt holds step 0, from which python -m cpc_ext.train --resume --out-dir {tmp_path} goes on" in error
    )
    assert "Traceback" not in error
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0
    assert not (tmp_path / "summary.json").exists()

    assert train("--out-dir", tmp_path, "--resume") == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("step", [3, 4])
def test_a_stop_that_cannot_be_saved_is_an_error(train, in_steps, full_disk, tmp_path, capsys, step):
    """Between two checkpoints, and where one was tried in the same step."""

    def fill_and_stop(number, values):
        full_disk(True)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    in_steps(fill_and_stop)
    assert train("--out-dir", tmp_path) == 1
    full_disk(False)
    said = capsys.readouterr()
    assert f"step {step} of 8 could not be saved" in said.err
    assert "stopped at step" not in said.out


def test_a_kill_between_best_and_last_checkpoint_loses_neither(train, monkeypatch, tmp_path):
    class KilledError(BaseException):
        pass

    def kill(source, target):
        raise KilledError

    assert train("--out-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "replace_with_link", kill)
        with pytest.raises(KilledError):
            train("--out-dir", tmp_path / "parts")
    assert train("--out-dir", tmp_path / "parts", "--resume") == 0
    for name in ("checkpoint.pt", "best.pt"):
        assert_equal_trees(*(load_checkpoint(tmp_path / run / name) for run in ("whole", "parts")))


def test_best_checkpoint_without_hard_links(train, with_losses, monkeypatch, tmp_path, capsys):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with_losses(1, 1, 2, 2)
    assert train("--out-dir", tmp_path, "--checkpoint-every", "2", "--steps", "4") == 0
    assert steps_in(tmp_path) == {"checkpoint.pt": 4, "best.pt": 2}
    assert "warning" not in capsys.readouterr().err


def test_output_that_cannot_be_printed_costs_nothing_else(train, in_steps, monkeypatch, tmp_path):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert train("--out-dir", tmp_path) == 0
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8


# ---- The folder ----


def test_folder_that_is_removed_while_training(train, at_step, tmp_path, capsys):
    run = tmp_path / "run"
    at_step(5, lambda values: shutil.rmtree(run))
    assert train("--out-dir", run) == 1
    error = capsys.readouterr().err
    assert "step 8 of 8 could not be saved" in error
    assert f"{run} is gone, and with it the training" in error
    assert "Traceback" not in error


def test_folder_that_is_removed_before_the_figures(train_fully, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: shutil.rmtree(run) or {})
    assert train_fully("--out-dir", run, "--steps", "1") == 1
    error = capsys.readouterr().err
    assert f"could not write to {run}" in error
    assert "is gone" in error


def test_another_programs_config_is_not_overwritten(train, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("title: something else\n")
    assert train("--out-dir", tmp_path) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "title: something else\n"


def test_a_run_that_lost_its_checkpoint_is_not_begun_anew(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path, "--steps", "4") == 0
    (tmp_path / "checkpoint.pt").unlink()
    assert train("--out-dir", tmp_path, "--steps", "4") == 1
    assert train("--out-dir", tmp_path, "--resume") == 1
    error = capsys.readouterr().err
    assert "already holds a run" in error
    assert "best.pt is there: copy it to checkpoint.pt" in error


# ---- Signals ----


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_other_signals_save_as_well(train, at_step, tmp_path, capsys, number):
    before = signal.signal(number, signal.SIG_DFL)  # Under nohup it would be ignored.
    try:
        at_step(2, lambda values: os.kill(os.getpid(), number))
        assert train("--out-dir", tmp_path) == 128 + number
        assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert f"--resume --out-dir {tmp_path}" in capsys.readouterr().out


def test_a_warning_may_be_repeated(train, at_step, tmp_path):
    """A scheduler that warns twice wants no less that the run is saved."""
    at_step(2, lambda values: [os.kill(os.getpid(), signal.SIGUSR1) for _ in range(2)])
    assert train("--out-dir", tmp_path) == 128 + signal.SIGUSR1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_are_ignored_stay_so(train, at_step, tmp_path, number):
    """As nohup has it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_step(2, lambda values: os.kill(os.getpid(), number))
        assert train("--out-dir", tmp_path, "--steps", "4") == 0
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_while_evaluating(train_fully, monkeypatch, tmp_path, capsys, number):
    monkeypatch.setattr(CPCv1Task, "save", lambda task, run: None)
    with monkeypatch.context() as patch:
        patch.setattr(CPCv1Task, "evaluate", lambda task: os.kill(os.getpid(), number))
        assert train_fully("--out-dir", tmp_path, "--steps", "2") == 128 + number
    error = capsys.readouterr().err
    assert "the training is complete, what comes after it is not" in error
    assert f"holds step 2, from which python -m cpc_ext.train --resume --out-dir {tmp_path} goes on" in error
    assert f"ended by {signal.Signals(number).name}" in error
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: {})
    assert train_fully("--out-dir", tmp_path, "--resume") == 0
    assert (tmp_path / "summary.json").exists()


def test_signal_while_the_data_is_read(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_data, "load_dataset", lambda *a, **o: os.kill(os.getpid(), signal.SIGTERM))
    assert train("--out-dir", tmp_path / "run") == 143
    assert "ended by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_siblings_that_are_stopped_are_ended_and_others_are_not():
    stopped, running = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2))
    try:
        stopped.send_signal(signal.SIGSTOP)
        os.waitpid(stopped.pid, os.WUNTRACED)  # Until it is.
        Ranks(torch.device("cpu"), siblings=(stopped.pid, 2**22 + 1, running.pid)).end_stopped()
        assert stopped.wait(60) == -signal.SIGKILL
        assert running.poll() is None
    finally:
        for process in (stopped, running):
            process.kill()
            process.wait()


def test_siblings_are_those_of_the_same_torchrun(monkeypatch):
    def gather(found, mine, group):
        host, parent, process = mine
        found[:] = [mine, (host, parent, process + 1), (host, parent + 1, 7), ("other", parent, 8)]

    monkeypatch.setattr(distribution.dist, "all_gather_object", gather)
    assert distribution._siblings(4, None) == (os.getpid() + 1,)


# ---- The images ----


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, tiny_dataset):
    run = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "load_dataset", lambda *arguments, **options: tiny_dataset)
        patch.setattr(CPCv1Task, "evaluate", lambda task: {})
        patch.setattr(CPCv1Task, "save", lambda task, run: None)
        assert program.main([*SMALL, *TINY, "--out-dir", str(run), "--steps", "4"]) == 0
    return run


@pytest.fixture
def trained(trained_once, tmp_path):
    """The folder of a run of four steps."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


def with_images(monkeypatch, dataset, **changes):
    changed = replace(dataset, pretrain=replace(dataset.pretrain, **changes))
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: changed)


@pytest.mark.parametrize("recorded", [True, False])
def test_resuming_on_another_number_of_images(trained, train, tiny_dataset, monkeypatch, capsys, recorded):
    if not recorded:  # A checkpoint of before there was a record of the images.
        rewrite(trained, lambda state: state.pop("data"))
    images = tiny_dataset.pretrain
    with_images(monkeypatch, tiny_dataset, images=images.images[:40], labels=images.labels[:40])
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 1
    assert "the data changed since step 4 was saved: 44 images then, 40 now" in capsys.readouterr().err


def test_resuming_on_other_names(train, tiny_dataset, monkeypatch, tmp_path, capsys):
    names = [f"class/{number}.png" for number in range(43)] + ["class/\udcff.png"]
    with_images(monkeypatch, tiny_dataset, paths=names)
    assert train("--out-dir", tmp_path, "--steps", "1") == 0
    assert train("--resume", "--out-dir", tmp_path, "--steps", "2") == 0
    with_images(monkeypatch, tiny_dataset, paths=[*names[1:], names[0]])
    assert train("--resume", "--out-dir", tmp_path, "--steps", "3") == 1
    assert "the data changed since step 2 was saved: other names" in capsys.readouterr().err


def test_resuming_on_other_pixels_is_said(trained, train, tiny_dataset, monkeypatch, capsys):
    images = tiny_dataset.pretrain.images.copy()
    images[3] ^= 1
    with_images(monkeypatch, tiny_dataset, images=images)
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 0
    assert "warning: --resume: the data changed since step 4 was saved: other pixels" in capsys.readouterr().err


def test_checkpoints_without_a_record_of_the_images_are_resumed(trained, train):
    rewrite(trained, lambda state: state.pop("data"))
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 0


# ---- Checkpoints that are none ----


def rewrite(run, change):
    """Change a run's checkpoint."""
    state = load_checkpoint(run / "checkpoint.pt")
    state.pop("format")
    change(state)
    (run / "checkpoint.pt").unlink()  # It may share its content with best.pt.
    save_checkpoint(run / "checkpoint.pt", state)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(state):
        for name in path:
            state = state[name]
        state[last] = value

    return change


def first_weight(change):
    def apply(state):
        name = next(iter(state["model"]))
        state["model"][name] = change(state["model"][name])

    return apply


def deep(levels):
    tree = {}
    for _ in range(levels):
        tree = {"in": tree}
    return tree


# For those who use the weights.
WRONG_FOR_ALL = {
    "step text": put("step", "4"),
    "step negative": put("step", -5),
    "step true": put("step", True),
    "step number": put("step", 4.0),
    "step huge": put("step", 10**30),
    "model list": put("model", [1, 2]),
    "weight that is a number": lambda state: state["model"].update({next(iter(state["model"])): 3}),
    "model gone": lambda state: state.pop("model"),
    "weight of another shape": first_weight(lambda value: value[:1]),
    "weight of integers": first_weight(lambda value: value.long()),
    "weight of complex numbers": first_weight(lambda value: value.to(torch.complex64)),
    "weight without memory": first_weight(lambda value: value.to("meta")),
    "sparse weight": first_weight(lambda value: value.to_sparse()),
    "description list": put("description", [1]),
    "too deep": put("task", deep(100)),
}
# For those who go on with the training.
WRONG_FOR_RESUME = {
    **{f"{name} text": put(name, "x") for name in ("config", "optimizer", "streams", "sampler", "since_log", "data")},
    **{f"{name} gone": lambda state, name=name: state.pop(name) for name in ("config", "sampler", "scaler", "seconds")},
    "config wrong": put("config", "optimization", "steps", "many"),
    "best_loss text": put("best_loss", "low"),
    "seconds negative": put("seconds", -1.0),
    "last_metrics of text": put("last_metrics", "loss", "low"),
    "optimizer without groups": put("optimizer", {"state": {}}),
    "optimizer of another shape": put("optimizer", "state", 0, "exp_avg", torch.zeros(3)),
    "optimizer of text": put("optimizer", "state", 0, "exp_avg", "x"),
    "optimizer without steps": put("optimizer", "state", 0, "step", None),
    "streams of another type": put("streams", "views", torch.zeros(5056)),
    "streams cut": put("streams", "own", [{"torch": torch.zeros(3, dtype=torch.uint8), "torch_device": None}]),
    "sampler of text": put("sampler", "epoch", "1"),
    "sampler past the end": put("sampler", "batch", 5000),
    "count text": put("since_log", "count", "3"),
    "sums of lists": put("since_best", "sums", {"loss": [1]}),
    "sums of vectors": put("since_best", "sums", {"loss": torch.zeros(3)}),
}


def assert_told(capsys, run):
    said = capsys.readouterr()
    assert "error:" in said.err, said
    assert str(run) in said.err
    assert "Traceback" not in said.err
    assert len(said.err) < 3000


@pytest.mark.parametrize("name", [*WRONG_FOR_ALL, *WRONG_FOR_RESUME])
def test_resuming_from_a_wrong_checkpoint(trained, train, capsys, name):
    rewrite(trained, (WRONG_FOR_ALL | WRONG_FOR_RESUME)[name])
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 1
    assert_told(capsys, trained)


@pytest.mark.parametrize("name", WRONG_FOR_ALL)
def test_other_uses_of_a_wrong_checkpoint(trained, train, tmp_path, capsys, name):
    rewrite(trained, WRONG_FOR_ALL[name])
    if name != "description list":
        assert train("--resume-from", trained, "--out-dir", tmp_path / "new", "--steps", "1") == 1
        assert_told(capsys, trained)
    assert evaluate.main([str(trained), "--device", "cpu"]) == 1
    assert_told(capsys, trained)
    assert convert.main([str(trained), "--to", "cpcv2-pytorch", "--out", str(tmp_path / "out.pt")]) == 1
    assert_told(capsys, trained)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip", b"\x80\x04K\x01."])
def test_files_that_are_no_checkpoint(trained, train, capsys, content):
    (trained / "checkpoint.pt").unlink()
    (trained / "checkpoint.pt").write_bytes(content)
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 1
    assert_told(capsys, trained)


class Unknown:
    pass


@pytest.mark.parametrize("tree", [[1, 2], {"format": "1"}, {"format": True}, {"format": 1, "step": Unknown()}, {}])
def test_trees_that_are_no_checkpoint(trained, train, capsys, tree):
    (trained / "checkpoint.pt").unlink()
    torch.save(tree, trained / "checkpoint.pt")
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 1
    assert_told(capsys, trained)


def test_what_is_to_be_decompressed_is_bounded_by_the_file(trained, train, monkeypatch, capsys):
    """64 MiB of zeros in 64 KiB, of which nothing is read."""
    path = trained / "checkpoint.pt"
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**26))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: pytest.fail("it was decompressed"))
    assert train("--resume", "--out-dir", trained, "--steps", "5") == 1
    assert_told(capsys, trained)


def test_wrong_metrics_do_not_stop_a_run(train_fully, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: {})
    monkeypatch.setattr("cpc_ext.tasks.cpc_v1.task.save_patch_figures", lambda *arguments: None)
    assert train_fully("--out-dir", tmp_path, "--steps", "4") == 0
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'[]\n{"step": "5"}\n{"step": 4, "other": 1}\n\0\0\0')
    assert train_fully("--out-dir", tmp_path, "--resume", "--steps", "6") == 0
    assert (tmp_path / "curves.png").exists()


def test_states_are_not_changed_by_looking(trained):
    state = load_checkpoint(trained / "checkpoint.pt")
    assert set(state["data"]) == {"images", "shape", "names", "labels", "pixels"}
    assert_equal_trees(copy.deepcopy(state), load_checkpoint(trained / "checkpoint.pt"))
    assert np.isfinite(state["best_loss"])
