"""A run from the command line to its results: config, data, training, evaluation, and the files that remain."""

from __future__ import annotations

import json
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cpc_ext
from cpc_ext.data import Dataset, load_dataset
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.cli import Command, describe, parse
from cpc_ext.training.config import RunConfig, option, validate_config
from cpc_ext.training.cpc_v1 import CPCv1Task
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loop import Trainer
from cpc_ext.training.pixelcnn import PixelCNNTask
from cpc_ext.training.precision import check_device
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog
from cpc_ext.training.simclr import SimCLRTask
from cpc_ext.training.stop_request import StopRequest
from cpc_ext.training.task import Task

__all__ = ["TASKS", "main"]

TASKS: dict[str, type[Task]] = {
    "cpc-v1": CPCv1Task,
    "pixelcnn": PixelCNNTask,
    "gated-pixelcnn": PixelCNNTask,
    "simclr": SimCLRTask,
}

# What a resumed run may do differently: none of it changes what the steps so far were.
_MAY_CHANGE = {
    "data_dir",
    "download",
    "epochs",
    "steps",
    "device",
    "compile",
    "log_every",
    "checkpoint_every",
    "sample_every",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m cpc_ext.train` with these arguments (default: those of the process); returns the exit status.

    0: the run is complete. 1: it could not start or go on, for a reason that was printed. 2 (raised as SystemExit):
    wrong options. 130, 143: stopped by Ctrl-C or SIGTERM, after saving.
    """
    try:
        return _run(parse(sys.argv[1:] if arguments is None else arguments))
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # While training, Ctrl-C is a request and no exception; before and after there is nothing to save.
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(command: Command) -> int:
    config = command.run
    device = check_device(config.compute.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # All batches have one shape, so the search pays once.
    if command.resume:
        assert command.out_dir is not None  # parse() saw to it.
        run = RunDir.reopen(command.out_dir)
    else:
        run = RunDir.create(command.out_dir, model=config.model, dataset=config.data.dataset)
    try:
        return _train(config, run, device, resume=command.resume)
    finally:
        run.release()


def _train(config: RunConfig, run: RunDir, device: torch.device, *, resume: bool) -> int:
    phases: dict[str, float] = {}
    print(f"cpc_ext {cpc_ext.__version__}, run in {run.path}\n{describe(config)}")
    state = load_checkpoint(run.checkpoint) if resume else None
    if state is not None:
        _check_same_run(validate_config(state["config"]), config)
    with _timed(phases, "data"):
        dataset = _load(config)
    try:
        task = TASKS[config.model](config, dataset, device)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    trainer = Trainer(task, config, run, device)
    if state is not None:
        trainer.resume(state)
    run.check_space(trainer.checkpoint_bytes)
    _write(run.config, config.to_yaml())
    print(
        f"{len(task.images)} images of {dataset.name}, {sum(p.numel() for p in task.model.parameters()):,} parameters, "
        f"{trainer.total_steps} steps" + (f", going on after step {trainer.step}" if resume else "")
    )

    log = RunLog(run, after_step=trainer.step)
    try:
        with StopRequest() as stop, _timed(phases, "training"):
            trainer.train(log, stop)
        if stop.signal:
            print(
                f"stopped at step {trainer.step} of {trainer.total_steps}; go on with:\n"
                f"  python -m cpc_ext.train --resume --out-dir {run.path}"
            )
            return stop.exit_code
        with _timed(phases, "evaluation"):
            results = task.evaluate()
        log.scalars(trainer.step, results)
        with _timed(phases, "figures"):
            task.save(run)
        summary = _summary(config, trainer, results, phases, device)
        _write(run.summary, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(
            f"could not write to {run.path}: {error}. The training is saved up to its last checkpoint: "
            f"make room and go on with --resume --out-dir {run.path}"
        ) from None
    finally:
        log.close()
    _report(results, phases, run)
    return 0


def _check_same_run(saved: RunConfig, wanted: RunConfig) -> None:
    """TrainingError where an option differs that would make the rest another run than the beginning."""
    before, now = _by_option(saved), _by_option(wanted)
    changed = [
        f"  {option(name)} is {before[name]} in the checkpoint, {now[name]} now"
        for name in before
        if name not in _MAY_CHANGE and before[name] != now[name]
    ]
    if changed:
        raise TrainingError(
            "--resume goes on with the same run, but\n"
            + "\n".join(changed)
            + f"\nonly these may change: {', '.join(sorted(map(option, _MAY_CHANGE)))}"
        )


def _by_option(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {"model": tree.pop("model")} | {name: value for section in tree.values() for name, value in section.items()}


def _load(config: RunConfig) -> Dataset:
    options = config.data
    try:
        return load_dataset(options.dataset, options.data_dir, download=options.download, image_size=options.image_size)
    except (OSError, ValueError) as error:
        # Both say which file or option is at fault.
        raise TrainingError(f"--dataset {options.dataset}: {error}") from None


def _summary(
    config: RunConfig, trainer: Trainer, results: dict[str, float], phases: dict[str, float], device: torch.device
) -> dict[str, Any]:
    final = {
        f"final_{name}": trainer.last_metrics[name] for name in ("loss", "accuracy") if name in trainer.last_metrics
    }
    return {
        "model": config.model,
        "dataset": config.data.dataset,
        **results,
        **final,
        "steps": trainer.step,
        "images_per_second": round(trainer.step * config.optimization.batch_size / max(trainer.seconds, 1e-9), 2),
        "peak_memory_bytes": _peak_memory_bytes(device),
        "training_seconds": round(trainer.seconds, 3),
        "phase_seconds": {name: round(seconds, 3) for name, seconds in phases.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
        "versions": {"cpc_ext": cpc_ext.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _peak_memory_bytes(device: torch.device) -> int:
    """Of the device's memory on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(results: dict[str, float], phases: dict[str, float], run: RunDir) -> None:
    if "probe_accuracy" in results:
        print(
            f"linear probe: {results['probe_accuracy']:.1%} of the test images "
            f"(the same encoder untrained {results['untrained_probe_accuracy']:.1%}, "
            f"always the same class {results['chance_accuracy']:.1%})"
        )
    if "bits_per_dim" in results:
        print(
            f"bits per dimension: {results['bits_per_dim']:.3f} of the held-out images "
            f"(training images {results['train_bits_per_dim']:.3f}, "
            f"best static histogram {results['static_histogram_bits_per_dim']:.3f})"
        )
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()))
    print(f"model, figures and metrics are in {run.path}")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - started
