"""Compares PixelCNN, gated PixelCNN and PixelCNN++ of equal size: bits per dimension over steps and over time.

Trains all three with `python -m cpc_ext.train`, one after another on the same images, and writes comparison.json,
comparison.md and comparison.png. Widths are chosen so that all have about the same number of parameters. Depths are
those of the data set's presets; learning rate and weight averaging are the same for all. After Ctrl-C, the same command
continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cpc_ext.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from cpc_ext.training import preset
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics

MODELS = {"pixelcnn": PixelCNN, "gated-pixelcnn": GatedPixelCNN, "pixelcnn++": PixelCNNPP}
# Colour-blind safe.
COLORS = {"pixelcnn": "#0072b2", "gated-pixelcnn": "#d55e00", "pixelcnn++": "#009e73"}
# Evaluations of held-out images in a run of a given number of steps.
LOOKS = 10
# Steps between evaluations for each minute of a run of a given time.
LOOK_EVERY = 8
# A number of steps that is never reached, for runs of a given time.
ENDLESS = 10**9
POLL_SECONDS = 1.0


class ComparisonError(Exception):
    """A comparison cannot be made; the message is one sentence."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, metavar="D", help="folder of images (default: generated textures)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images (default: the preset's)")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models to train (default: all three)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="number of updates of each model (default 600)")
    length.add_argument(
        "--minutes", type=float, metavar="M", help="training minutes of each model, at a constant learning rate"
    )
    parser.add_argument(
        "--parameters",
        type=int,
        default=300_000,
        metavar="P",
        help="number of parameters of each model (default 300000)",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images per update (default 16)")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="peak learning rate (default 1e-3)")
    parser.add_argument("--warmup-steps", type=int, default=50, metavar="N", help="warm-up updates (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs (default 0)")
    parser.add_argument(
        "--device", metavar="cpu|cuda", help="device to train on (default: an accelerator if there is one)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the runs and results")
    parsed = parser.parse_args(arguments)
    if parsed.steps is None and parsed.minutes is None:
        parsed.steps = 600
    for name in ("steps", "minutes", "parameters", "batch_size", "lr"):
        value = getattr(parsed, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')}: more than 0, got {value}")
    return parsed


# --- Which models ---


def width_for(model: str, layers: int, parameters: int) -> tuple[int, int]:
    """Return the width whose number of parameters is nearest to the wanted one, and that number."""
    step = 1 if model == "pixelcnn++" else 3  # The width must be a multiple of the three colours.

    def count(width: int) -> int:
        arguments = {"in_channels": 3, "channels": width, "layers": layers}
        if model == "pixelcnn":
            arguments["hidden_channels"] = arguments.pop("channels")
        if model == "pixelcnn++":
            arguments["blocks"] = arguments.pop("layers")
        return sum(parameter.numel() for parameter in MODELS[model](**arguments).parameters())

    low, high = step, step
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min(((width, count(width)) for width in (low, high)), key=lambda each: abs(each[1] - parameters))


def options_of(model: str, arguments: argparse.Namespace) -> tuple[list[str], dict[str, int]]:
    """Return the training program's options for a model, and the sizes that the table shows."""
    dataset = "textures" if arguments.data_dir is None else "folder"
    layers = preset(model, dataset).pixelcnn.layers
    width, parameters = width_for(model, layers, arguments.parameters)
    options = ["--model", model, "--dataset", dataset, "--layers", str(layers), "--hidden-channels", str(width)]
    options += ["--lr", str(arguments.lr), "--warmup-steps", str(arguments.warmup_steps)]
    # In the first steps the average has a smaller decay.
    options += ["--ema-decay", "0.999", "--batch-size", str(arguments.batch_size), "--seed", str(arguments.seed)]
    if model == "pixelcnn++":
        options += ["--dropout", "0"]  # Models so small underfit.
    if arguments.data_dir is not None:
        options += ["--data-dir", str(arguments.data_dir)]
    if arguments.image_size is not None:
        options += ["--image-size", str(arguments.image_size)]
    if arguments.minutes is not None:
        looks = max(1, round(LOOK_EVERY * arguments.minutes))
        options += ["--schedule", "constant", "--log-every", "5", "--sample-every", str(looks)]
    if arguments.device is not None:
        options += ["--device", arguments.device]
    return options, {"layers": layers, "width": width, "parameters": parameters}


def check_same(run: RunDir, options: list[str]) -> None:
    """Raise ComparisonError if the folder's run was started with other options than these."""
    if not run.config.is_file():
        return
    config, given = load_config(run.config), dict(zip(options[::2], options[1::2], strict=True))
    before = {
        "--model": config.model,
        "--dataset": config.data.dataset,
        "--layers": config.pixelcnn.layers,
        "--hidden-channels": config.pixelcnn.hidden_channels,
        "--batch-size": config.optimization.batch_size,
        "--lr": config.optimization.lr,
        "--warmup-steps": config.optimization.warmup_steps,
        "--seed": config.compute.seed,
        "--image-size": config.data.image_size,
        "--data-dir": config.data.data_dir,
        "--schedule": config.optimization.schedule,
    }
    for name, value in given.items():
        if name in before and str(before[name]) != value:
            raise ComparisonError(
                f"{run.path} holds a run with {name} {before[name]}, not {value}: choose another --out"
            )


# --- Training ---


def run_program(arguments: list[str], *, until: Callable[[], bool] | None = None) -> int:
    """Run the training program; interrupt it once ``until`` holds. Returns its exit status."""
    process = subprocess.Popen([sys.executable, "-m", "cpc_ext.train", *arguments])
    try:
        while process.poll() is None:
            if until is None:
                process.wait()
            elif until():
                process.send_signal(signal.SIGINT)
                process.wait()
            else:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        process.wait()  # It got the signal as well, and saves.
        raise
    return process.returncode


def train(model: str, options: list[str], run: RunDir, arguments: argparse.Namespace) -> None:
    """Train a model to its last step, continuing its run if there is one."""
    out = ["--out-dir", str(run.path)]
    if arguments.steps is not None:
        if run.summary.is_file() and json.loads(run.summary.read_text())["steps"] == arguments.steps:
            return
        length = ["--steps", str(arguments.steps)]
        if run.checkpoint.is_file():
            demand(model, run_program([*out, "--resume", *length]))
        else:
            looks = ["--sample-every", str(max(1, arguments.steps // LOOKS))]
            demand(model, run_program([*options, *out, *length, *looks]))
        return
    if run.summary.is_file() and trained_seconds(run) >= 60 * arguments.minutes:
        return
    length = ["--steps", str(ENDLESS)]
    while trained_seconds(run) < 60 * arguments.minutes:
        start = [*out, "--resume"] if run.checkpoint.is_file() else [*options, *out]
        status = run_program([*start, *length], until=lambda: trained_seconds(run) >= 60 * arguments.minutes)
        if status != 128 + signal.SIGINT:
            demand(model, status)
    # Resuming with as many steps as are done makes the run finish and write its summary.
    steps = last_checkpoint_step(run)
    demand(model, run_program([*out, "--resume", "--steps", str(steps)]))


def demand(model: str, status: int) -> None:
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status:
        raise ComparisonError(f"training {model} ended with status {status}, see above")


def trained_seconds(run: RunDir) -> float:
    """Return the seconds spent in steps, according to the log."""
    return max((record["seconds"] for record in read_metrics(run.metrics) if "seconds" in record), default=0.0)


def last_checkpoint_step(run: RunDir) -> int:
    return load_checkpoint(run.checkpoint)["step"]


# --- Results ---


def curves(run: RunDir) -> dict[str, dict[str, list[float]]]:
    """Return the curves of bits per dimension on training images and, as evaluated during the run, held-out images.

    Each curve has steps, seconds of training and bits.
    """
    records = read_metrics(run.metrics)
    logged = [record for record in records if "seconds" in record]
    observed = [record for record in records if "heldout_bits_per_dim" in record]
    known = [(0, 0.0), *((record["step"], record["seconds"]) for record in logged)]

    def points(records: list[dict[str, float]], name: str) -> dict[str, list[float]]:
        steps = [record["step"] for record in records]
        seconds = np.interp(steps, *zip(*known, strict=True)).round(3).tolist() if steps else []
        return {"steps": steps, "seconds": seconds, "bits_per_dim": [record[name] for record in records]}

    return {"training": points(logged, "bits_per_dim"), "heldout": points(observed, "heldout_bits_per_dim")}


def result_of(model: str, shape: dict[str, int], run: RunDir) -> dict[str, Any]:
    summary = json.loads(run.summary.read_text())
    names = ("steps", "training_seconds", "images_per_second", "bits_per_dim", "train_bits_per_dim")
    return {
        "model": model,
        **shape,
        **{name: summary[name] for name in names},
        "static_histogram_bits_per_dim": summary["static_histogram_bits_per_dim"],
        "curves": curves(run),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| model | layers | width | parameters | steps | minutes | images/s | bits/dim | training images |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        lines.append(
            f"| {result['model']} | {result['layers']} | {result['width']} | {result['parameters']:,} | "
            f"{result['steps']} | {result['training_seconds'] / 60:.1f} | {result['images_per_second']:.1f} | "
            f"{result['bits_per_dim']:.3f} | {result['train_bits_per_dim']:.3f} |"
        )
    if results:
        lines += ["", f"Best static histogram: {results[0]['static_histogram_bits_per_dim']:.3f} bits/dim."]
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for result in results:
        color = COLORS[result["model"]]
        label = f"{result['model']} ({result['bits_per_dim']:.2f})"
        for name, look in (
            ("training", {"linewidth": 1, "alpha": 0.35}),
            ("heldout", {"linewidth": 1.8, "marker": "o", "markersize": 4, "label": label}),
        ):
            curve = result["curves"][name]
            left.plot(curve["steps"], curve["bits_per_dim"], color=color, **look)
            right.plot(np.array(curve["seconds"]) / 60, curve["bits_per_dim"], color=color, **look)
    left.set_xlabel("step (parameter updates)")
    right.set_xlabel("training time (minutes)")
    left.set_ylabel("bits per dimension")
    right.set_title("thin: training; dots: held-out images, a part", fontsize=9, loc="right")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, title="at the end, all held-out images", fontsize=9, title_fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def write(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    document = {"arguments": asked, "complete": len(results) == len(arguments.models), "results": results}
    (arguments.out / "comparison.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.out / "comparison.md").write_text(table(results))
    draw(results, arguments.out / "comparison.png")


def main(arguments: argparse.Namespace) -> int:
    results: list[dict[str, Any]] = []
    try:
        for model in arguments.models:
            options, shape = options_of(model, arguments)
            run = RunDir(arguments.out / model)
            check_same(run, options)
            train(model, options, run, arguments)
            results.append(result_of(model, shape, run))
            write(results, arguments)
    except KeyboardInterrupt:
        print(f"stopped; what there is stays in {arguments.out}: the same command goes on with it", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ComparisonError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(results)}\nwritten: {arguments.out}/comparison.json, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
