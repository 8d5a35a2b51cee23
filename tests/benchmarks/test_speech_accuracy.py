"""The race of speech models (speech_accuracy.py): their training options, and how results are reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import speech_accuracy

from cpc_ext.programs.train_options import parse
from cpc_ext.training.presets import preset


@pytest.mark.parametrize("model", speech_accuracy.MODELS)
@pytest.mark.parametrize("dataset", ["voices", "librispeech"])
def test_models_have_the_preset_of_the_voices(model, dataset):
    options = [*speech_accuracy.short(model), "--dataset", dataset, "--time-budget", "1"]
    run, short = parse(options).run, preset("cpc-audio", "voices")
    assert (run.encoder.channels, run.context.context_channels) == (128, 128)
    assert run.encoder.norm == ("none" if model == "greedy-infomax" else "channel")
    assert (run.optimization.lr, run.optimization.batch_size) == (short.optimization.lr, short.optimization.batch_size)


def test_a_race(monkeypatch, capsys, tmp_path):
    called = []
    row = {"phones": 0.5, "speakers": 0.25}
    rows = dict.fromkeys(("trained", "untrained", "log-mel", "log-mel, 5 frames", "commonest"), row)

    def call(program, *arguments):
        called.append((program, *arguments))
        if program == "train":
            path = Path(arguments[arguments.index("--out-dir") + 1])
            (path / "evaluation").mkdir(parents=True)
            (path / "summary.json").write_text(json.dumps({"steps": 7, "training_seconds": 3.0}))
        else:
            (Path(arguments[0]) / "evaluation" / "speech.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(speech_accuracy, "call", call)
    out = tmp_path / "race.json"
    options = ["--models", "original", "modified", "--minutes", "2", "--data-dir", "spoken", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["speech_accuracy.py", *options, "--options", "--lr 3e-4 --norm batch"])
    speech_accuracy.main(speech_accuracy.parse_arguments())
    assert [each[0] for each in called] == ["train", "evaluate"] * 2
    assert called[0][called[0].index("--dataset") :][:4] == ("--dataset", "librispeech", "--data-dir", "spoken")
    assert parse(list(called[0][1 : called[0].index("--no-evaluate")])).run.optimization.lr == 3e-4
    said = capsys.readouterr().out
    assert said.count("| log-mel |") == 1
    assert "| CPC, modified | 2 | 0 | 7 | 50.0% | 25.0% |" in said
    assert [result["model"] for result in json.loads(out.read_text())["results"]] == ["original", "modified"]


def test_more_voices_to_learn_from(monkeypatch):
    called = []

    def call(program, *arguments):
        called.append((program, *arguments))
        raise SystemExit("that is enough")

    monkeypatch.setattr(speech_accuracy, "call", call)
    with pytest.raises(SystemExit):
        speech_accuracy.run("original", 10.0, 0, ["phones"], utterances=3)
    assert called[0][called[0].index("--utterances") + 1] == "3"


def test_recordings_without_labels_have_no_phones(monkeypatch, capsys):
    rows = {name: {"speakers": 0.25} for name in ("trained", "untrained", "log-mel")}
    result = {"rows": rows, "steps": 7}
    asked = []
    monkeypatch.setattr(speech_accuracy, "run", lambda *arguments: asked.append(arguments) or result)
    options = ["--models", "original", "--data-dir", "spoken", "--measures", "speakers"]
    monkeypatch.setattr(sys, "argv", ["speech_accuracy.py", *options])
    speech_accuracy.main(speech_accuracy.parse_arguments())
    assert asked == [("original", 10.0, 0, ["speakers"], Path("spoken"), None, "")]
    assert "| CPC, original | 10 | 0 | 7 | 25.0% |" in capsys.readouterr().out


def test_recordings_are_as_many_as_they_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speech_accuracy.py", "--data-dir", "spoken", "--utterances", "9"])
    with pytest.raises(SystemExit):
        speech_accuracy.parse_arguments()
    assert "--utterances is of the drawn voices, not of --data-dir" in capsys.readouterr().err
