"""Runs on speech as a user starts them: files, resumption, evaluation and use."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cpc_ext import hub
from cpc_ext.evaluation import speech
from cpc_ext.measures import frame_probe
from cpc_ext.programs import embed, evaluate
from cpc_ext.programs import training as program
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.data_record import differences
from tests.tasks.test_speech_tasks import dataset_of, recordings
from tests.training.conftest import PNG

TINY = (
    *("--window", "6400", "--channels", "8", "--context-channels", "8", "--pred-steps", "3", "--neg-samples", "4"),
    *("--batch-size", "4", "--steps", "6", "--log-every", "2", "--checkpoint-every", "3", "--warmup-steps", "1"),
    *("--device", "cpu", "--precision", "fp32"),
)
MODELS = ("cpc-audio", "greedy-infomax-audio")


@pytest.fixture(autouse=True)
def small_voices(monkeypatch):
    """Replace the voices by tones, and use one thread, as tensors are small."""
    data = dataset_of(test=recordings(6, 4.0))
    # Probes of so few frames need no thousand steps.
    quick = replace(frame_probe._RECIPES["standard"], epochs=2, least_steps=150)
    monkeypatch.setitem(frame_probe._RECIPES, "standard", quick)
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: data)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(*options):
    return program.main([*map(str, (*TINY, *options))])


def logged(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    changing = ("windows_per_second", "seconds")
    return [{name: value for name, value in json.loads(line).items() if name not in changing} for line in lines]


@pytest.mark.parametrize("model", MODELS)
def test_run_leaves_everything(model, tmp_path, capsys):
    assert train("--model", model, "--out-dir", tmp_path) == 0
    records = [record for record in logged(tmp_path) if "loss" in record]
    assert [record["step"] for record in records] == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["windows_per_second"] > 0 for line in lines if "loss" in line)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == model
    assert summary["windows_per_second"] > 0
    for name in ("phone_accuracy", "untrained_phone_accuracy", "log_mel_phone_accuracy", "speaker_accuracy"):
        assert 0 <= summary[name] <= 1
    for name in ("curves.png", "frames.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG), name
    said = capsys.readouterr().out
    assert "8 recordings (0.1 minutes) of voices" in said
    assert "linear probe of phones: " in said
    assert "linear probe of speakers: " in said


@pytest.mark.parametrize("options", [("--keep-state", "--windows", "sequential", "--window", "3200"), ()])
@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_is_the_same_to_the_bit(model, options, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train("--model", model, "--out-dir", whole, *options) == 0
    assert train("--model", model, "--out-dir", parts, *options, "--steps", "3", "--schedule", "constant") == 0
    # A run of another length has another schedule: both are constant here.
    constant = tmp_path / "constant"
    assert train("--model", model, "--out-dir", constant, *options, "--schedule", "constant") == 0
    assert program.main(["--resume", "--out-dir", str(parts), "--steps", "6"]) == 0
    assert logged(parts)[-1]["loss"] == logged(constant)[-1]["loss"]
    one, other = (load_checkpoint(run / "checkpoint.pt")["model"] for run in (parts, constant))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_recordings_are_noticed(tmp_path, monkeypatch, capsys):
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    record = load_checkpoint(tmp_path / "checkpoint.pt")["data"]
    assert record["recordings"] == 8
    more = dataset_of(recordings(10))
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: more)
    capsys.readouterr()
    assert program.main(["--resume", "--out-dir", str(tmp_path), "--steps", "9"]) == 1
    assert "8 recordings then, 10 now. Go on with the windows as they were" in capsys.readouterr().err
    assert differences(record, {**record, "sound": "other"}) == ["other sound"]


def test_one_module_after_another(tmp_path, capsys):
    first, second = tmp_path / "0", tmp_path / "1"
    assert train("--model", "greedy-infomax-audio", "--train-module", 0, "--out-dir", first) == 0
    options = ("--train-module", "1", "--resume-from", str(first), "--out-dir", str(second))
    assert program.main([*options, "--steps", "6"]) == 0
    before, after = (load_checkpoint(run / "checkpoint.pt")["model"] for run in (first, second))
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert "1" in changed
    assert not torch.equal(before["encoder.layers.1.conv.weight"], after["encoder.layers.1.conv.weight"])
    assert torch.equal(before["encoder.layers.0.conv.weight"], after["encoder.layers.0.conv.weight"])
    # Modules after the trained ones have the seed's weights, and readers of the files are told so.
    for run, trained in ((first, 1), (second, 2)):
        with safe_open(run / "encoder.safetensors", "pt") as file:
            assert file.metadata()["modules"] == str(trained)
        capsys.readouterr()
        saved = hub.Model.of_run(run)
        assert f"{run} trained module {trained - 1} and not those after it" in capsys.readouterr().err
        expected = load_checkpoint(run / "checkpoint.pt")["model"]
        assert all(torch.equal(value, expected[name]) for name, value in saved.model.state_dict().items())
        assert str(tmp_path) not in saved.record["recipe"]


def test_evaluation(tmp_path, capsys):
    runs = [tmp_path / model for model in MODELS]
    for model, run in zip(MODELS, runs, strict=True):
        assert train("--model", model, "--out-dir", run) == 0
    capsys.readouterr()
    assert evaluate.main([str(runs[0]), "--measures", "all", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    results = json.loads((runs[0] / "evaluation" / "speech.json").read_text())
    assert set(results["rows"]) == {"trained", "untrained", "log-mel", "log-mel, 5 frames", "commonest"}
    spectra = results["rows"]["log-mel"]
    assert set(spectra) == {"phones", "phones-hidden", "speakers", "speakers-last", "abx within", "abx across"}
    assert spectra["phones"] > 0.9 > results["rows"]["commonest"]["phones"]
    assert spectra["abx within"] < 0.1
    assert f"{spectra['phones']:.1%}" in said
    for name in ("confusion_phones.png", "confusion_phones-hidden.png"):
        assert (runs[0] / "evaluation" / name).read_bytes().startswith(PNG)
    assert evaluate.main([*map(str, runs), "--per-module", "--device", "cpu"]) == 0
    assert (runs[0] / "evaluation" / "accuracy_by_depth.png").read_bytes().startswith(PNG)
    depths = json.loads((runs[1] / "evaluation" / "by_depth.json").read_text())
    assert depths["layers"] == ["module0", "module1", "module2", "module3", "encoder", "context"]
    assert len(depths["by_depth"]["phones"]["trained"]) == 6


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    """The untrained network and the spectra are the same for a run, unless what they depend on changes."""
    run = tmp_path / "run"
    assert train("--model", "cpc-audio", "--out-dir", run) == 0
    made = []
    original = speech.RecordingFrames.of

    def of(waveforms, make, chosen, **options):
        made.append(make)
        return original(waveforms, make, chosen, **options)

    monkeypatch.setattr(speech.RecordingFrames, "of", of)

    def measure(*options):
        """Return the table's rows, the number of kinds of frames computed, and the number of earlier results reused."""
        made.clear()
        assert evaluate.main([str(run), *options, "--device", "cpu"]) == 0
        rows = json.loads((run / "evaluation" / "speech.json").read_text())["rows"]
        said = re.search(r"\((\d+) of these results were there already\)", capsys.readouterr().out)
        return rows, len(set(made)), int(said[1]) if said else 0

    capsys.readouterr()
    first = measure()
    assert first[1:] == (4, 0)
    (run / "evaluation" / "confusion_phones.png").unlink()
    assert measure() == (first[0], 0, 8)
    assert (run / "evaluation" / "confusion_phones.png").is_file()
    # Other measures are added, and the first ones are there still.
    both, *counts = measure("--measures", "phones,speakers,speakers-last")
    assert counts == [4, 8]
    assert all(both[name].items() >= row.items() for name, row in first[0].items())
    assert measure("--measures", "phones") == (
        {name: {"phones": row["phones"]} for name, row in first[0].items()},
        *(0, 4),
    )
    # The spectra do not depend on the layer; all do on how frames and labels are paired.
    assert measure("--layer", "encoder")[1:] == (2, 4)
    assert measure("--alignment", "front")[1:] == (4, 0)
    measure()
    # A run that goes on has other weights, but began with the same.
    assert program.main(["--resume", "--out-dir", str(run), "--steps", "9"]) == 0
    later = measure()
    assert later[1:] == (1, 6)
    assert all(later[0][name] == first[0][name] for name in first[0] if name != "trained")
    assert later[0]["trained"] != first[0]["trained"]
    # Phones that are called otherwise, and one other sample.
    train_set, test_set = recordings(), recordings()
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset_of(train_set, test_set))
    whole = measure()
    test_set.samples[7] += 1
    assert measure()[1:] == (4, 0)
    test_set.samples[7] -= 1
    assert measure()[:2] == (whole[0], 4)
    monkeypatch.setattr("cpc_ext.__version__", "99")
    assert measure()[1] == 4


def test_options_of_an_evaluation(tmp_path):
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    results = {}
    for name, options in {
        "plain": (),
        "layer": ("--layer", "encoder"),
        "alignment": ("--alignment", "front"),
        "minutes": ("--minutes", "0.05"),
    }.items():
        assert evaluate.main([str(tmp_path), "--measures", "phones", *options, "--device", "cpu"]) == 0
        results[name] = json.loads((tmp_path / "evaluation" / "speech.json").read_text())
    assert (results["plain"]["layer"], results["layer"]["layer"]) == ("context", "encoder")
    assert results["layer"]["rows"]["trained"] != results["plain"]["rows"]["trained"]
    assert results["alignment"]["rows"]["trained"] != results["plain"]["rows"]["trained"]
    assert results["minutes"]["train_recordings"] < results["plain"]["train_recordings"]
    assert set(results["plain"]["rows"]["trained"]) == {"phones"}


def test_alignments_by_number_are_for_frames_of_10_ms(tmp_path, capsys):
    assert train("--model", "greedy-infomax-audio", "--out-dir", tmp_path) == 0
    for options, words in (
        (("--per-module", "--alignment", "same-index"), "but module0, module1, module2, module3 of"),
        (("--layer", "module2", "--alignment", "front"), "--alignment front counts frames of 10 ms, but module2 of"),
    ):
        assert evaluate.main([str(tmp_path), *options, "--device", "cpu"]) == 1
        assert words in capsys.readouterr().err
    options = ("--layer", "encoder", "--alignment", "front", "--measures", "phones")
    assert evaluate.main([str(tmp_path), *options, "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--measures", "vowels"), "--measures: expected all, or some of phones"),
        (("--layer", "context7"), "--layer: "),
        (("--minutes", "0"), "--minutes: above 0"),
        (("--minutes", "0.01"), "--minutes 0.01: what there is to learn from is of one speaker, so nothing is to be"),
        (("--labels", "5"), "--labels would have no effect: runs on speech are measured by --measures"),
        (("--out", "x.png"), "--out would have no effect: runs on speech are drawn together with --per-module"),
        (("--per-module", "--layer", "encoder"), "--layer would have no effect: --per-module looks at every layer"),
    ],
)
def test_what_evaluation_refuses(options, words, tmp_path, capsys):
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    assert embed.main([str(tmp_path), "--data-dir", str(tmp_path), "--per-patch"]) == 1
    assert "--per-patch would have no effect: it is of runs on images" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path), *options, "--device", "cpu"]) == 1
    assert words in capsys.readouterr().err


def test_what_is_no_run_is_told_before_options_that_do_not_fit(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "nowhere"), "--minutes", "1", "--device", "cpu"]) == 1
    assert "nowhere is not a run's folder: there is no config.yaml" in capsys.readouterr().err
    # An embedding's folder of frames, a layer and a form are of runs on speech, too.
    options = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "frames"), "--layer", "encoder", "--device", "cpu"]
    assert embed.main([str(tmp_path / "nowhere"), *options]) == 1
    assert "nowhere is not a run's folder: there is no config.yaml" in capsys.readouterr().err


def test_recordings_without_labels_are_not_measured(tmp_path, monkeypatch, capsys):
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    plain = dataset_of(recordings(labelled=False), recordings(labelled=False))
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: plain)
    assert evaluate.main([str(tmp_path), "--device", "cpu"]) == 1
    assert "the recordings of --dataset voices have no phones" in capsys.readouterr().err


def test_what_has_labels_is_measured(tmp_path, monkeypatch):
    """Folders of recordings tell who speaks, not what is said."""
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    train_set, test_set = (replace(recordings(), phones=None, phone_starts=None) for _ in range(2))
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset_of(train_set, test_set))
    with pytest.warns(UserWarning, match="have no phones: phones, phones-hidden, abx are left out"):
        assert evaluate.main([str(tmp_path), "--measures", "all", "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "evaluation" / "speech.json").read_text())["rows"]
    assert set(rows["trained"]) == {"speakers", "speakers-last"}


def test_a_measure_that_cannot_be_made_leaves_the_others(tmp_path, monkeypatch):
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    monkeypatch.setattr("cpc_ext.evaluation.speech.abx_error", Mock(side_effect=ValueError("items: none to compare")))
    with pytest.warns(UserWarning, match="abx within speakers is left out: none to compare"):
        assert evaluate.main([str(tmp_path), "--measures", "abx,speakers", "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "evaluation" / "speech.json").read_text())["rows"]
    assert set(rows["trained"]) == {"speakers"}


def test_abx_within_a_speaker_needs_no_other(tmp_path, monkeypatch):
    assert train("--model", "cpc-audio", "--out-dir", tmp_path) == 0
    alone = recordings()
    alone = replace(alone, speakers=np.zeros(len(alone), np.int64))
    results = []
    # Silence is in no triple, whatever its position among the phones and its spelling.
    for names in (("SIL", "A", "E", "I", "O"), ("A", "sil", "E", "I", "O"), ("A", "E", "I", "O", "U")):
        dataset = replace(dataset_of(alone, alone), phone_names=names)
        monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, dataset=dataset, **options: dataset)
        with pytest.warns(UserWarning, match="abx across speakers is left out: no two phones in the same context"):
            assert evaluate.main([str(tmp_path), "--measures", "abx", "--device", "cpu"]) == 0
        results.append(json.loads((tmp_path / "evaluation" / "speech.json").read_text())["rows"]["trained"])
        assert set(results[-1]) == {"abx within"}
    assert results[0] == results[2] != results[1]


@pytest.fixture
def sounds(tmp_path) -> Path:
    """A folder of recordings, of which one is too short and one damaged."""
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    folder = tmp_path / "sounds" / "somebody"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        soundfile.write(folder / f"{number}.wav", rng.standard_normal(8000 + 1600 * number) / 10, 16000)
    soundfile.write(folder / "short.wav", np.zeros(30), 16000)
    (folder / "damaged.flac").write_bytes(b"fLaC" + bytes(50))
    return folder.parent


@pytest.mark.parametrize("form", ["npy", "text"])
def test_frames_of_a_folder(form, sounds, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "frames"
    assert train("--model", "cpc-audio", "--out-dir", run) == 0
    capsys.readouterr()
    options = ("--data-dir", sounds, "--format", form, "--device", "cpu")
    assert embed.main([str(run), *map(str, (*options, "--layer", "encoder", "--out", tmp_path / "others"))]) == 0
    capsys.readouterr()
    assert embed.main([str(run), *map(str, (*options, "--out", out))]) == 0
    said = capsys.readouterr()
    ending = "npy" if form == "npy" else "txt"
    made, others = ((folder / "somebody" / f"0.{ending}").read_bytes() for folder in (out, tmp_path / "others"))
    assert made != others
    assert "frames of 8 values of 2 recordings" in said.out
    assert "short.wav" in said.err
    assert "damaged.flac" in said.err
    for number, frames in ((0, 50), (1, 60)):
        if form == "npy":
            made = np.load(out / "somebody" / f"{number}.npy")
            times = np.load(out / "somebody" / f"{number}.times.npy")
        else:
            rows = np.loadtxt(out / "somebody" / f"{number}.txt")
            times, made = rows[:, 0], rows[:, 1:]
        assert made.shape == (len(times), 8)
        assert abs(len(times) - frames) <= 2
        np.testing.assert_allclose(times[:2], [20 / 16000, 180 / 16000], atol=1e-5)


def test_recordings_that_differ_in_their_endings(sounds, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    run = tmp_path / "run"
    assert train("--model", "cpc-audio", "--out-dir", run) == 0
    soundfile.write(sounds / "somebody" / "0.flac", np.zeros(4000), 16000)
    assert embed.main([str(run), "--data-dir", str(sounds), "--device", "cpu"]) == 0
    names = {path.name for path in (run / "frames" / "somebody").glob("*.npy") if ".times" not in path.name}
    assert names == {"0.wav.npy", "0.flac.npy", "1.npy"}


def test_no_recordings_frames_are_called_as_what_is_anothers(sounds, tmp_path):
    """Frames of 1.times.wav have not the name of 1.wav's times, nor those of 0.wav.flac that of 0.wav's frames."""
    soundfile = pytest.importorskip("soundfile")
    run, folder = tmp_path / "run", sounds / "somebody"
    assert train("--model", "cpc-audio", "--out-dir", run) == 0
    lengths = {"0.wav": 50, "1.wav": 60, "0.flac": 20, "0.wav.flac": 30, "1.times.wav": 40}
    for name in ("0.flac", "0.wav.flac", "1.times.wav"):
        soundfile.write(folder / name, np.zeros(160 * lengths[name]), 16000)
    assert embed.main([str(run), "--data-dir", str(sounds), "--device", "cpu"]) == 0
    stems = ["0.wav", "1", "0.flac", "0.wav.flac", "1.times.wav"]
    written = run / "frames" / "somebody"
    assert {path.name for path in written.iterdir()} == {f"{stem}{e}" for stem in stems for e in (".npy", ".times.npy")}
    for stem, frames in zip(stems, lengths.values(), strict=True):
        assert np.load(written / f"{stem}.npy").shape == (frames, 8)
        assert np.load(written / f"{stem}.times.npy").shape == (frames,)


def test_what_embedding_refuses(sounds, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--model", "cpc-audio", "--out-dir", run) == 0
    for options, words in (
        ((), "--data-dir: name the folder of recordings"),
        (("--data-dir", sounds, "--layer", "context9"), "error: --layer: expected one of"),
        (("--data-dir", sounds, "--dataset", "voices"), "--dataset: a run on speech embeds"),
        (("--data-dir", sounds, "--out", "x.npy"), "--out: of a run on speech the name of a folder, got x.npy"),
        (("--data-dir", tmp_path / "nowhere"), "--data-dir: "),
    ):
        capsys.readouterr()
        assert embed.main([str(run), *map(str, options), "--device", "cpu"]) == 1
        assert words in capsys.readouterr().err
