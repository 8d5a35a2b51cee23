"""Accuracy of probes of phones and speakers on speech models after minutes on one core, and on log-mel spectra.

Every model trains for the same time on the same recordings, with the options of its preset for the generated voices.
The recordings are those voices, more utterances of them, or recordings in LibriSpeech's layout with phone labels.
`python -m cpc_ext.evaluate` evaluates each model, and log-mel spectra of single frames and of five. Prints a table;
with ``--out`` writes JSON after every run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calling import call
from machine import describe, result_file, write_json

from cpc_ext.training.config import option
from cpc_ext.training.presets import preset_entry

# Each model's title in the table, its name, and its further options.
MODELS = {
    "original": ("CPC, original", "cpc-audio", ()),
    "modified": ("CPC, modified", "cpc-audio", ("--recipe", "modified")),
    "greedy-infomax": ("Greedy InfoMax", "greedy-infomax-audio", ()),
}


def short(model: str) -> list[str]:
    """Return the options of a model and of its preset for the generated voices, without steps and recipe."""
    _, name, more = MODELS[model]
    options = ["--model", name, *more]
    for section in preset_entry(name, "voices").values():
        for field, value in section.items():
            if field not in ("steps", "recipe"):
                options += [option(field), str(value)]
    return options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-dir", type=Path, help="recordings, as for --dataset librispeech (default: generated voices)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[10.0],
        help="training times in minutes, each in a run of its own (default 10)",
    )
    parser.add_argument(
        "--utterances",
        type=int,
        help="number of utterances of each generated voice to train on (default: the 11 that probes learn from)",
    )
    parser.add_argument(
        "--options", default="", help="more options of python -m cpc_ext.train for every model, such as '--lr 2e-4'"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=("phones", "speakers"),
        default=["phones", "speakers"],
        help="probes to train on the frames (default: both); recordings without labels have no phones",
    )
    parser.add_argument("--out", type=Path, metavar="DIR|FILE.json", help="write JSON there")
    arguments = parser.parse_args()
    if arguments.utterances is not None and arguments.data_dir is not None:
        parser.error("--utterances is of the drawn voices, not of --data-dir")
    return arguments


def run(
    model: str,
    minutes: float,
    seed: int,
    measures: Sequence[str],
    data_dir: Path | None = None,
    utterances: int | None = None,
    more: str = "",
) -> dict[str, Any]:
    """Train and evaluate a model, and return its accuracies. Raises SystemExit with a failed program's stderr.

    more: further options of the run, which come last.
    """
    data = ["voices"] if data_dir is None else ["librispeech", "--data-dir", str(data_dir)]
    options = [*short(model), "--dataset", *data, "--device", "cpu"]
    options += ["--time-budget", str(minutes), "--seed", str(seed)]
    if utterances is not None:
        options += ["--utterances", str(utterances)]
    options += shlex.split(more)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        call("train", *options, "--no-evaluate", "--out-dir", str(path))
        call("evaluate", str(path), "--measures", ",".join(measures))
        summary = json.loads((path / "summary.json").read_text())
        rows = json.loads((path / "evaluation" / "speech.json").read_text())["rows"]
    return {
        "model": model,
        "minutes": minutes,
        "seed": seed,
        "utterances": utterances,
        "command": " ".join(("python -m cpc_ext.train", *options)),
        "steps": summary["steps"],
        "training_seconds": summary["training_seconds"],
        "rows": rows,
    }


def main(arguments: argparse.Namespace) -> None:
    path = None if arguments.out is None else result_file(arguments.out, "cpu", "speech-accuracy")
    results: list[dict[str, Any]] = []
    print(f"| frames of | minutes | seed | steps | {' | '.join(arguments.measures)} |")
    print("|---|---|---|---" + "|---" * len(arguments.measures) + "|")

    def cells(row: dict[str, float]) -> str:
        return " | ".join(f"{row[measure]:.1%}" for measure in arguments.measures)

    wanted = [(seed, m, model) for seed in arguments.seeds for m in arguments.minutes for model in arguments.models]
    for seed, minutes, model in wanted:
        result = run(
            model,
            minutes,
            seed,
            arguments.measures,
            arguments.data_dir,
            arguments.utterances,
            arguments.options,
        )
        if not results:
            for name, row in result["rows"].items():
                if name.startswith(("log-mel", "commonest")):
                    print(f"| {name} | | | | {cells(row)} |")
        results.append(result)
        for state, steps in (("trained", result["steps"]), ("untrained", 0)):
            row = result["rows"][state]
            said = f"{MODELS[model][0]}{'' if steps else ', untrained'} | {minutes:g} | {seed} | {steps}"
            print(f"| {said} | {cells(row)} |", flush=True)
        if path is not None:
            write_json(path, {"machine": describe("cpu"), "results": results})
    if path is not None:
        print(f"written: {path}")


if __name__ == "__main__":
    main(parse_arguments())
