"""Common failures of contrastive learning on generated textures: each failing run next to one without the fault.

Prints a table; with ``--out`` writes JSON, with the command of every run, and a chart of the contrastive accuracy and
that of nearest neighbours during training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from calling import call
from charts import draw_failures
from machine import describe, result_file, write_json

from cpc_ext.programs.train_options import parse

# Evaluations of the encoder during training, for the curves.
PROBES = 8


class Failure(NamedTuple):
    """A failure. title: name in table and chart. model: the model. options: the options that make it fail."""

    title: str
    model: str
    options: tuple[str, ...]


FAILURES = {
    "colour": Failure(
        "colours tell a patch's neighbours",
        "cpc-v2",
        ("--no-gray", "--no-patch-norm", "--no-patch-augmentation"),
    ),
    "brightness": Failure("brightness tells a patch's neighbours", "cpc-v1", ("--no-patch-norm",)),
    "negatives": Failure("one negative", "cpc-v1", ("--neg-samples", "1")),
    "crops": Failure("crops too small to have anything in common", "simclr", ("--min-crop-area", "0.005")),
    "no-jitter": Failure("colours tell an image", "simclr", ("--jitter-probability", "0", "--gray-probability", "0")),
    "rate": Failure("a learning rate ten times too high", "cpc-v1", ("--lr", "1e-2")),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--failures", nargs="+", choices=list(FAILURES), default=list(FAILURES), help="default: all")
    parser.add_argument("--steps", type=int, help="number of updates of each run (default: the model's preset)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR|FILE.json", help="write JSON and PNG there")
    return parser.parse_args()


def command_of(failure: Failure, options: tuple[str, ...], arguments: argparse.Namespace) -> tuple[str, ...]:
    length = () if arguments.steps is None else ("--steps", str(arguments.steps))
    return ("--model", failure.model, *options, *length, "--seed", str(arguments.seed))


def run(command: tuple[str, ...]) -> dict[str, Any]:
    """Run a training command, and return its curves and probes. Raises SystemExit with its stderr if it fails."""
    every = max(1, (parse([*command]).run.optimization.steps or PROBES) // PROBES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        call("train", *command, "--out-dir", str(path), "--probe-every", str(every))
        summary = json.loads((path / "summary.json").read_text())
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        "command": " ".join(("python -m cpc_ext.train", *command)),
        "found": [[line["step"], line["accuracy"]] for line in metrics if "accuracy" in line],
        "neighbours": [[line["step"], line["knn_accuracy"]] for line in metrics if "knn_accuracy" in line],
        "linear": summary["probe_accuracy"],
        "untrained_linear": summary["untrained_probe_accuracy"],
    }


def main(arguments: argparse.Namespace) -> None:
    path = None if arguments.out is None else result_file(arguments.out, "cpu", "failures")
    runs: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    print("| what goes wrong | targets found | linear probe | without it: targets found | linear probe |")
    print("|---|---|---|---|---|")
    for name in arguments.failures:
        failure = FAILURES[name]
        row: dict[str, Any] = {"name": name, "title": failure.title}
        for side, options in (("wrong", failure.options), ("right", ())):
            command = command_of(failure, options, arguments)
            if command not in runs:
                runs[command] = run(command)
            row[side] = runs[command]
        rows.append(row)
        runs_of_row = [row[side] for side in ("wrong", "right")]
        cells = [f"{share:.1%}" for each in runs_of_row for share in (each["found"][-1][1], each["linear"])]
        print(f"| {failure.title} | {' | '.join(cells)} |", flush=True)
        if path is not None:
            write_json(path, {"machine": describe("cpu"), "results": rows})
    if path is not None:
        draw_failures(rows, path.with_suffix(".png"))
        print(f"written: {path}")


if __name__ == "__main__":
    main(parse_arguments())
