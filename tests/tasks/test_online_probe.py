"""Probes during training: correct results, no influence on the run, and errors if a requirement is missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpc_ext.data import ImageSet
from cpc_ext.data.spread import spread
from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.programs import training as program
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks import online_probe
from cpc_ext.tasks.cpc_audio.task import CPCAudioTask
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.tasks.cpc_v2.task import CPCv2Task
from cpc_ext.tasks.greedy_infomax.task import GreedyTask
from cpc_ext.tasks.greedy_infomax_audio.task import GreedyAudioTask
from cpc_ext.tasks.online_probe import FrameProbe, ImageProbe, probe_curve
from cpc_ext.tasks.simclr.task import SimCLRTask
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from tests.programs.test_speech_run import TINY as TINY_SPEECH
from tests.tasks import test_speech_tasks as speech
from tests.tasks.test_every_option import CPU, config_of, dataset_of, noise
from tests.tasks.test_simclr_run import TINY as TINY_SIMCLR
from tests.training.conftest import PNG, SMALL, TINY, logged

# The options of each model's tiny run.
RUNS = {
    CPCv1Task: (*SMALL, *TINY),
    CPCv2Task: (*SMALL, *(word for word in TINY if word not in ("--neg-samples", "16")), "--model", "cpc-v2"),
    GreedyTask: (*SMALL, *TINY, "--model", "greedy-infomax", "--modules", "2"),
    SimCLRTask: TINY_SIMCLR,
}


def plain_accuracy(known, labels, asked, expected, *, neighbours: int) -> float:
    """Compute the accuracy by the formula: each nearest neighbour votes with exp(cosine / 0.07)."""
    right = 0
    for query, label in zip(asked.double(), expected.tolist(), strict=True):
        cosines = torch.cosine_similarity(query[None], known.double())
        votes: dict[int, float] = {}
        for index in cosines.argsort(descending=True)[:neighbours].tolist():
            vote = math.exp((cosines[index].item() - 1) / 0.07)
            votes[labels[index].item()] = votes.get(labels[index].item(), 0.0) + vote
        right += max(votes, key=votes.__getitem__) == label
    return right / len(asked)


def striped(count: int, seed: int) -> ImageSet:
    """Return noise that is brighter in one half; the class is which half."""
    labels = np.random.default_rng(seed).integers(0, 2, count)
    images = np.random.default_rng(seed).integers(0, 200, (count, 3, 32, 32))
    images[labels == 0, :, :16] += 55
    images[labels == 1, :, 16:] += 55
    return ImageSet(images.astype(np.uint8), labels)


def test_accuracy_of_images(monkeypatch):
    """Some images from all of the set vote, others are asked for."""
    monkeypatch.setattr(online_probe, "_LABELLED", 30)
    monkeypatch.setattr(online_probe, "_ASKED", 20)
    train, test = striped(50, 0), striped(40, 1)
    dataset = replace(dataset_of(noise()), train=train, test=test)
    probe = ImageProbe(dataset, CPU)
    chosen = [spread(30, 50), spread(20, 40)]
    (known, labels), (asked, expected) = (
        (torch.from_numpy(each.images[at]).double().mean((1, 3)), torch.from_numpy(each.labels[at]))
        for each, at in zip((train, test), chosen, strict=True)
    )
    found = probe.found(lambda images: images.double().mean((1, 3)).float())
    assert found["knn_accuracy"] == plain_accuracy(known, labels, asked, expected, neighbours=20)
    assert found["knn_accuracy"] > 0.8
    assert found["effective_rank"] == pytest.approx(effective_rank(known))
    assert probe.chance == max(expected.tolist().count(label) for label in (0, 1)) / 20


def test_accuracy_of_frames(monkeypatch):
    """The spectrum's bands tell the tones that are the phones."""
    monkeypatch.setattr(online_probe, "_LABELLED", 150)
    monkeypatch.setattr(online_probe, "_ASKED", 60)
    monkeypatch.setattr(online_probe, "_SECONDS", {"train": 4.0, "test": 2.0})
    train, test = speech.recordings(8), speech.recordings(6)
    asked_for: list[int] = []

    def frames(samples):
        asked_for.append(len(samples))
        windows = samples.double().unfold(0, 400, 160)
        return torch.fft.rfft(windows).abs()[:, :64].float(), 200 + 160 * torch.arange(len(windows))

    probe = FrameProbe(speech.dataset_of(train, test))
    assert probe.found(frames)["knn_accuracy"] > 0.9
    assert 3 <= len(asked_for) < 14  # Not all recordings.
    assert 0.2 <= probe.chance < 0.5
    alike = probe.found(lambda samples: (torch.ones(9, 2), 200 + 160 * torch.arange(9)))
    assert alike["knn_accuracy"] < 0.6
    assert alike["effective_rank"] == 0.0


def test_what_a_probe_asks_for():
    images = dataset_of(noise())
    for lacking in (
        replace(images, train=None),
        replace(images, test=None),
        replace(images, train=ImageSet(noise())),
        replace(images, test=ImageSet(noise())),
    ):
        with pytest.raises(TrainingError, match="--probe-every: textures has no labels of training and of test"):
            ImageProbe(lacking, CPU)
        # A task that is not trained needs no labels.
        task = CPCv1Task(config_of("cpc-v1", probe_every=2), lacking, CPU)
        with pytest.raises(TrainingError, match="--probe-every"):
            task.prepare(Ranks(CPU), resumed=False)
    for sounds in (
        speech.dataset_of(speech.recordings(), None),
        speech.dataset_of(speech.recordings(labelled=False), speech.recordings()),
        speech.dataset_of(speech.recordings(), speech.recordings(labelled=False)),
    ):
        with pytest.raises(TrainingError, match="--probe-every: voices has no phones of training and of test"):
            FrameProbe(sounds)


def test_a_run_without_probes_has_no_curve_of_them(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    assert probe_curve(run.metrics, None) is None


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_with_probes_is_the_run_without(kind, train_with, tmp_path, monkeypatch, capsys):
    """They change nothing but what is logged of them, and they begin with the untrained encoder."""
    monkeypatch.setattr(kind, "evaluate", lambda task: {})
    assert train_with(*RUNS[kind], "--out-dir", tmp_path / "with", "--probe-every", "3") == 0
    monkeypatch.setattr(kind, "save", lambda task, run: None)
    assert train_with(*RUNS[kind], "--out-dir", tmp_path / "without") == 0
    records = logged(tmp_path / "with")
    assert [record for record in records if "loss" in record] == logged(tmp_path / "without")
    probed = [record for record in records if "knn_accuracy" in record]
    assert [record["step"] for record in probed] == [0, 3, 6, 8]
    assert all(set(record) == {"step", "knn_accuracy", "effective_rank"} for record in probed)
    assert all(0 <= record["knn_accuracy"] <= 1 < record["effective_rank"] for record in probed)
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert summary["knn_accuracy"] == [[record["step"], record["knn_accuracy"]] for record in probed]
    assert summary["final_knn_accuracy"] == probed[-1]["knn_accuracy"]
    assert "knn_accuracy" not in json.loads((tmp_path / "without" / "summary.json").read_text())
    assert (tmp_path / "with" / "curves.png").read_bytes().startswith(PNG)
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("with", "without"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert torch.equal(one["streams"]["own"][0]["torch"], other["streams"]["own"][0]["torch"])
    assert "evaluating the trained model ..." in capsys.readouterr().out


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_has_the_same_probes(kind, train_with, interrupted_as_whole):
    options = RUNS[kind]
    interrupted_as_whole(
        lambda *more: train_with(*(() if "--resume" in more else options), *more), kind, "--probe-every", "2"
    )


@pytest.mark.parametrize("kind", [CPCAudioTask, GreedyAudioTask])
def test_runs_on_speech(kind, tmp_path, monkeypatch):
    """Also where contexts go on from window to window."""
    data = speech.dataset_of(test=speech.recordings(6))
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: data)
    monkeypatch.setattr(kind, "evaluate", lambda task: {})
    model = {CPCAudioTask: "cpc-audio", GreedyAudioTask: "greedy-infomax-audio"}[kind]
    state = ("--keep-state", "--windows", "sequential", "--window", "3200")
    options = (*TINY_SPEECH, *state, "--model", model, "--schedule", "constant")
    for name, more in (("with", ("--probe-every", "2")), ("without", ())):
        assert program.main([*options, "--out-dir", str(tmp_path / name), *more]) == 0
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    probed = read_metrics(tmp_path / "with" / "metrics.jsonl", having=("knn_accuracy",))
    assert [record["step"] for record in probed] == [0, 2, 4, 6]
    assert (tmp_path / "with" / "curves.png").read_bytes().startswith(PNG)


def test_options_of_both_kinds():
    assert parse(["--probe-every", "7"]).run.probe.probe_every == 7
    assert parse(["--model", "cpc-audio", "--probe-every", "7"]).run.probe.probe_every == 7
    assert parse([]).run.probe.probe_every is None
