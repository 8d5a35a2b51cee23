"""Accuracy of the features of each method after minutes of training on one core or a GPU, on the same photographs.

Every method trains for the same time, with the options that `python -m cpc_ext.train --dataset folder` chooses for such
images, in one process on one core each, or, with ``--device cuda``, one after another on the GPU. A linear probe and
nearest neighbours on the same labelled images then evaluate frozen features of the central view. lightly's SimCLR, with
the same encoder, takes part if lightly is installed. Prints a table; with ``--out`` writes JSON after every run and a
chart at the end, and continues an existing file. In a folder the file is named after the day on which the race began.
The exit status is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import Any

from accuracy_run import ENTRANTS, Entry, lacks
from charts import draw_accuracy
from machine import at_least, describe, result_file, write_json

RUN = Path(__file__).with_name("accuracy_run.py")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of images, as for --dataset folder")
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[10.0],
        help="training times in minutes, each in a run of its own (default 10); 0: train for the steps in --options, "
        "for a machine that is not idle",
    )
    parser.add_argument("--methods", nargs="+", choices=list(ENTRANTS), help="methods to train (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--options", default="", help="more options of python -m cpc_ext.train for every method, such as '--norm layer'"
    )
    parser.add_argument(
        "--labels", type=at_least(1), default=10_000, help="maximum number of labelled images (default 10000)"
    )
    parser.add_argument("--device", default="cpu", help="device to train on (default cpu, with a core per run)")
    parser.add_argument("--jobs", type=at_least(1), help="runs at once (default: one per core, or one on a GPU)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR|FILE.json", help="write JSON and PNG there; an existing FILE.json is continued"
    )
    arguments = parser.parse_args()
    arguments.jobs = arguments.jobs or (os.cpu_count() if arguments.device == "cpu" else 1)
    return arguments


def wanted(arguments: argparse.Namespace) -> Iterator[Entry]:
    """Yield every requested run, ordered by seed."""
    for seed in arguments.seeds:
        for minutes in arguments.minutes:
            for method in arguments.methods or ENTRANTS:
                # Some methods have no training time to set.
                given = minutes if ENTRANTS[method].timed else 0.0
                yield Entry(method, given, seed, arguments.labels, arguments.options, arguments.device)


def run_entry(entry: Entry, data_dir: Path, core: int) -> dict[str, Any]:
    """Run an entry in a process of its own, and return its result or its error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(RUN), json.dumps(entry._asdict()), str(data_dir), str(out), str(core)]
        environment = {**os.environ} | ({"OMP_NUM_THREADS": "1"} if entry.device == "cpu" else {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if out.is_file():
            return json.loads(out.read_text())
        return entry._asdict() | {"error": (done.stderr.strip().splitlines() or ["it was killed"])[-1]}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of means over seeds, with one row for each method and time."""
    lines = [
        "| method | minutes | took | linear | k-NN | untrained | images a second | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            found.setdefault((title(result), result["minutes"]), []).append(result)
    for (name, minutes), runs in sorted(found.items(), key=lambda item: (item[0][1], -mean_of(item[1], "linear"))):
        took = [run["training_seconds"] / 60 for run in runs if "training_seconds" in run]
        cells = [name, f"{minutes:g}" if minutes else "", f"{mean(took):.1f}" if took else ""]
        for measure in ("linear", "knn", "untrained_linear"):
            values = [100 * run[measure] for run in runs if run.get(measure) is not None]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "")
        rates = [run["images_per_second"] for run in runs if run.get("images_per_second")]
        cells += [f"{mean(rates):.0f}" if rates else "", ", ".join(str(run["seed"]) for run in runs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def title(result: dict[str, Any]) -> str:
    """Return a run's name in the table and the chart."""
    options = result.get("options", "")
    return ENTRANTS[result["method"]].title + (f", `{options}`" if options else "")


def mean_of(runs: Sequence[dict[str, Any]], name: str) -> float:
    return mean(run[name] for run in runs)


def main(arguments: argparse.Namespace) -> int:
    """Run the race, and return the exit status: 1 if a run failed."""
    path = None if arguments.out is None else result_file(arguments.out, arguments.device, "accuracy")
    results = json.loads(path.read_text())["results"] if path is not None and path.is_file() else []
    results = [result for result in results if "error" not in result]
    have = {Entry(**{name: result[name] for name in Entry._fields if name in result}) for result in results}
    entries = [entry for entry in dict.fromkeys(wanted(arguments)) if entry not in have]
    for method in dict.fromkeys(entry.method for entry in entries):
        if reason := lacks(method, arguments.device):
            print(f"left out: {method} ({reason})")
            entries = [entry for entry in entries if entry.method != method]
    cores: SimpleQueue[int] = SimpleQueue()
    for core in range(arguments.jobs):
        cores.put(core)

    def finish(entry: Entry) -> dict[str, Any]:
        core = cores.get()
        try:
            return run_entry(entry, arguments.data_dir, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(finish, entries):
            said = result.get("error") or f"linear {result['linear']:.1%}, k-NN {result['knn']:.1%}"
            print(f"{result['method']}, {result['minutes']:g} minutes, seed {result['seed']}: {said}", flush=True)
            results.append(result)
            if path is not None:
                machine = describe(arguments.device) | {"jobs": arguments.jobs}
                if arguments.device == "cpu":
                    machine["threads"] = 1
                write_json(path, {"machine": machine, "results": results})
    print(table(results))
    if path is not None:
        named = [result | {"title": title(result)} for result in results if "error" not in result]
        named.sort(key=lambda result: (list(ENTRANTS).index(result["method"]), result.get("options", "")))
        machine = "one core" if arguments.device == "cpu" else describe(arguments.device)["device"]
        draw_accuracy(named, path.with_suffix(".png"), machine=machine)
        print(f"written: {path}")
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
