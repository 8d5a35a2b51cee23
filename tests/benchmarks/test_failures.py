"""The gallery of failures: each is a valid run, paired with one that differs only in the cause of the failure."""

from __future__ import annotations

import json
import sys

import failures
import pytest

from cpc_ext.programs.train_options import parse
from tests.training.conftest import PNG


@pytest.mark.parametrize("name", failures.FAILURES)
def test_runs_of_a_failure(name):
    failure = failures.FAILURES[name]
    wrong, right = (parse(["--model", failure.model, *options]).run for options in (failure.options, ()))
    assert wrong != right
    assert wrong.optimization.steps == right.optimization.steps


def test_a_gallery(monkeypatch, capsys, tmp_path):
    made = []

    def run(command):
        made.append(command)
        value = 0.25 * len(made)
        curve = [[0, 0.1], [4, value]]
        return {"command": " ".join(command), "found": curve, "neighbours": curve, "linear": value}

    monkeypatch.setattr(failures, "run", run)
    out = tmp_path / "gallery.json"
    chosen = ["--failures", "negatives", "rate", "--steps", "8", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["failures.py", *chosen, "--out", str(out)])
    failures.main(failures.parse_arguments())
    # The run with which both are compared is made once.
    shared = ("--model", "cpc-v1", "--steps", "8", "--seed", "3")
    assert made == [
        ("--model", "cpc-v1", "--neg-samples", "1", *shared[2:]),
        shared,
        ("--model", "cpc-v1", "--lr", "1e-2", *shared[2:]),
    ]
    assert "| one negative | 25.0% | 25.0% | 50.0% | 50.0% |" in capsys.readouterr().out
    first, second = json.loads(out.read_text())["results"]
    assert first["right"] == second["right"] == {**second["right"], "linear": 0.5}
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
