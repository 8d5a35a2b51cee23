"""The work of `python -m cpc_ext.train`: load the data, train, evaluate, and write the run's files."""

from __future__ import annotations

import json
import platform
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import cpc_ext
from cpc_ext.programs.command_line import exit_status
from cpc_ext.programs.train_options import Command, describe, parse
from cpc_ext.tasks.online_probe import PROBED
from cpc_ext.training.atomic_file import write_text
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import RunConfig, explain, option, options_that_may_change, validate_config
from cpc_ext.training.data_record import described
from cpc_ext.training.distribution import Ranks, joined_ranks, lost_contact
from cpc_ext.training.errors import (
    EncodingsNotFiniteError,
    TooFewExamplesError,
    TrainingError,
    speaker,
    unfailing_output,
    warn,
    writing,
)
from cpc_ext.training.loggers import check_loggers
from cpc_ext.training.loop import Trainer
from cpc_ext.training.precision import check_device
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_data import load_data
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog, read_metrics
from cpc_ext.training.starting_weights import take_weights
from cpc_ext.training.stop_request import EndedBySignal, StopRequest, signals_raise
from cpc_ext.training.task import Task
from cpc_ext.training.time_budget import filled, seconds_per_step

__all__ = ["main", "of_known_length", "run"]


def main(arguments: Sequence[str] | Command | None = None) -> int:
    """Run `python -m cpc_ext.train` with these arguments (default: those of the process); returns the exit status.

    The arguments may also be given as parsed by :func:`cpc_ext.programs.train_options.parse`.

    0: the run is complete. 1: it could not start or go on, for a reason that was printed. 2 (raised as SystemExit):
    wrong options. 128 + the signal's number: stopped by a signal (Ctrl-C 130, SIGTERM 143, SIGUSR1 138 ...), during
    training after saving. Under torchrun every process calls this.
    """

    def train() -> int:
        with signals_raise():
            return run(given if isinstance(given, Command) else parse(given))[0]

    given = sys.argv[1:] if arguments is None else arguments
    with unfailing_output():
        return exit_status(train)


def _lost(error: RuntimeError, run: RunDir | None) -> str:
    """Return the message for when other processes are gone."""
    saved = (
        ""
        if run is None
        else (
            f" The training is saved up to its last checkpoint: go on with {run.resuming}, on any number of processes"
        )
    )
    return (
        "another process of this run has ended or no longer answers, so this one ends as well."
        f"{saved} ({str(error).splitlines()[0]})"
    )


def run(
    command: Command, keep: Callable[[], Path] | None = None, resuming: Callable[[Path], str] | None = None
) -> tuple[int, Path]:
    """Start or resume a run; returns the exit status, 0 if the run is complete, and the run's folder.

    Args:
        command: the parsed options.
        keep: writes the data into a folder and returns it; it becomes the run's --data-dir. Processes may take
            different times for it.
        resuming: returns the code that resumes the run in a folder, for messages; None: the command line.

    Raises:
        TrainingError: the run cannot start or go on.
    """
    config = command.run
    with joined_ranks(config.compute.device) as ranks:
        if keep is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"data_dir": keep()})})
            ranks.wait()
        ranks = replace(ranks, pipeline=config.pipeline)
        check_device(str(ranks.device))
        ranks.on_main(lambda: check_loggers(config.output.logger))
        if ranks.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # All batches have one shape, so the search pays once.
        held: list[RunDir] = []
        mine: RunDir | None = None

        def hold() -> Path:
            if command.resume:
                assert command.out_dir is not None  # parse() has checked this.
                held.append(RunDir.reopen(command.out_dir))
            else:
                held.append(RunDir.create(command.out_dir, model=config.model, dataset=config.data.dataset))
            return held[0].path

        try:
            path = ranks.on_main(hold)
            mine = held[0] if held else RunDir(path)
            if resuming is not None:
                mine.resuming = resuming(path)
            return _train(config, command, mine, ranks), path
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            ranks.end_stopped()
            raise TrainingError(_lost(error, mine)) from None
        finally:
            for folder in held:
                folder.release()


def _train(config: RunConfig, command: Command, run: RunDir, ranks: Ranks) -> int:
    phases: dict[str, float] = {}
    ranks.say(f"cpc_ext {cpc_ext.__version__}, run in {run.path}\n{describe(config)}")
    state = _checkpoint_to_resume(config, run, ranks) if command.resume else None
    # Announce work that may take seconds or minutes before it begins.
    ranks.say(f"loading {config.data.dataset} ...")
    with _timed(phases, "data"):
        dataset = load_data(config) if state is None else load_data(config, state.get("data"))
        ranks.wait()  # Processes that fetch or decode data take longer than others.
    start = config.optimization.resume_from
    budgeted = config.optimization.time_budget is not None

    def prepared(config: RunConfig) -> tuple[RunConfig, Task, Trainer]:
        if budgeted:
            with _timed(phases, "calibration"):
                config = of_known_length(config, dataset, run, ranks, state, command.given)
        task = _task(config, dataset, ranks)
        if start is not None and state is None:
            take_weights(task, RunDir(start))
        return config, task, Trainer(task, config, run, ranks)

    try:
        config, task, trainer = prepared(config)
    except TooFewExamplesError as error:
        if not command.of_preset or "batch_size" in command.given:
            raise
        config, task, trainer = prepared(_with_smaller_batch(config, error, ranks))
    if state is not None:
        trainer.resume(state)
    warmup = config.optimization.warmup_steps
    if ranks.main and warmup >= trainer.total_steps:
        warn(
            f"the {trainer.total_steps} steps of this run end within its --warmup-steps {warmup}: the learning "
            f"rate only rises, to {trainer.total_steps / warmup:.0%} of --lr. Give fewer, or more steps"
        )
    with _timed(phases, "data"):
        task.prepare(ranks, resumed=state is not None)
    log = _opened_log(config, run, trainer, ranks)
    ranks.say(
        f"{described(task.examples)} of {dataset.name}, "
        f"{sum(p.numel() for p in task.model.parameters()):,} parameters, "
        f"{trainer.total_steps} steps"
        + (f", {ranks.world_size} processes" if ranks.world_size > 1 else "")
        + (f", going on after step {trainer.step}" if state is not None else "")
        + (f", from the weights of {start}" if start is not None and state is None else "")
    )
    try:
        with _timed(phases, "training"):
            stopped = _take_steps(trainer, log, run, ranks, forecast=not budgeted and state is None)
        if stopped is not None:
            return stopped
        if log is None:
            return 0  # The main process does the rest.
        results: dict[str, float] = {}
        if config.output.evaluate:
            ranks.say("evaluating the trained model ...")
            with _timed(phases, "evaluation"):
                try:
                    results = task.evaluate()
                except EncodingsNotFiniteError as error:
                    warn(f"the trained model could not be evaluated: {error}")
        log.scalars(trainer.step, results)
        ranks.say("drawing its figures ...")
        with _timed(phases, "figures"):
            task.save(run)
            log.images(trainer.step, sorted(run.path.glob("*.png")))
        summary = _summary(config, task.unit, trainer, results | _probed(run), phases, ranks)
        write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"could not write to {run.path} ({error}): make room; {trainer.on_disk()}") from None
    except (EndedBySignal, KeyboardInterrupt):
        # A signal came during the evaluation or the figures.
        print(f"\nthe training is complete, what comes after it is not; {trainer.on_disk()}", file=sys.stderr)
        raise
    finally:
        if log is not None:
            log.close()
    _report(results, phases, run)
    return 0


def _with_smaller_batch(config: RunConfig, error: TooFewExamplesError, ranks: Ranks) -> RunConfig:
    """Return the config with the largest batch that the examples fill instead of the preset's; warn of it.

    Raises the given error if no batch is valid.
    """
    tree = config.model_dump()
    processes = ranks.share.world_size
    size = tree["optimization"]["batch_size"] = error.most // processes * processes
    try:
        smaller = validate_config(tree)
    except ValidationError:
        raise error from None
    if ranks.main:
        warn(
            f"what there is to learn from fills no batch of the default --batch-size "
            f"{config.optimization.batch_size}: this run takes {size}"
        )
    return smaller


def _task(config: RunConfig, dataset: Any, ranks: Ranks) -> Task:
    """Create the task. Raises TrainingError if the data set does not fit the config."""
    try:
        return task_class(config.model)(config, dataset, ranks.device)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def of_known_length(
    config: RunConfig,
    dataset: Any,
    run: RunDir,
    ranks: Ranks,
    state: dict[str, Any] | None,
    given: Collection[str] = (),
) -> RunConfig:
    """Return the config with the number of steps that fills its time budget, measured on a temporary model.

    Args:
        config: a config with a time budget.
        dataset: the loaded data set.
        run: the run's folder.
        ranks: the processes of the run.
        state: the checkpoint of a resumed run, whose steps count; else None.
        given: field names of the options that stay as they are.
    """
    minutes = config.optimization.time_budget
    assert minutes is not None
    ranks.say("measuring how long a step takes ...")
    task = _task(config, dataset, ranks)
    trainer = Trainer(task, config, run, ranks)
    # Start from the run's weights, because what the task prepares from them, such as the outputs of frozen modules, is
    # kept for the run itself.
    start = config.optimization.resume_from
    if state is not None:
        trainer.take_weights(state)
    elif start is not None:
        take_weights(task, RunDir(start))
    task.prepare(ranks, resumed=state is not None)
    pace = seconds_per_step(trainer.timed_steps(), 60 * minutes)
    so_far = {} if state is None else {"steps": state["step"], "seconds": state["seconds"]}
    config = filled(config, pace, given=given, **so_far)
    ranks.say(f"{config.optimization.steps} steps of about {1e3 * pace:.3g} ms fill {minutes:g} minutes of training")
    return config


def _checkpoint_to_resume(config: RunConfig, run: RunDir, ranks: Ranks) -> dict[str, Any] | None:
    """Load the run's checkpoint, or return None if the run ended before its first.

    Raises TrainingError if it is the checkpoint of another run.
    """
    if not run.checkpoint.exists():
        ranks.say("this run ended before its first checkpoint: it starts from its beginning")
        return None
    state = load_checkpoint(run.checkpoint)
    if "optimizer" not in state:
        raise TrainingError(
            f"--resume: {run.checkpoint} holds a model and no training to go on with; start from it with "
            f"--resume-from {shlex.quote(str(run.path))}"
        )
    _check_same_run(_saved_config(run, state), config)
    return state


def _opened_log(config: RunConfig, run: RunDir, trainer: Trainer, ranks: Ranks) -> RunLog | None:
    """Write the run's config and open its log in the main process; return the log there, and None in the others.

    Raises TrainingError if the folder cannot be written to or its disk lacks space.
    """
    logs: list[RunLog] = []

    def prepare() -> None:
        run.check_space(trainer.checkpoint_bytes)
        with writing(run.path, "--out-dir"):
            write_text(run.config, config.to_yaml())
            logs.append(RunLog(run, after_step=trainer.step, loggers=config.output.logger))

    ranks.on_main(prepare)
    for log in logs:
        log.config(config)
    return logs[0] if logs else None


def _take_steps(trainer: Trainer, log: RunLog | None, run: RunDir, ranks: Ranks, *, forecast: bool) -> int | None:
    """Train to the end and return None, or until a signal and return the exit status.

    forecast: see :meth:`Trainer.train`.
    """
    with StopRequest(again_ends=ranks.world_size == 1, talk=ranks.main) as stop:
        try:
            trainer.train(log, stop, forecast=forecast)
            stopped = ranks.any(stop.signal is not None)
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            ranks.end_stopped()
            # Print it here, while SIGTERM, which torchrun sends next, only sets a flag.
            print(f"\n{speaker()}error: {_lost(error, run)}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
    if not stopped:
        return None
    ranks.say(f"stopped at step {trainer.step} of {trainer.total_steps}; go on with:\n  {run.resuming}")
    return stop.exit_code or 128 + signal.SIGTERM


def _saved_config(run: RunDir, state: dict[str, Any]) -> RunConfig:
    """Return the config in a checkpoint. Raises TrainingError if it is missing or not valid."""
    try:
        return validate_config(state["config"])
    except (KeyError, ValidationError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else "it has no config"
        raise TrainingError(f"--resume: {run.checkpoint} does not fit this run: {reason}") from None


def _check_same_run(saved: RunConfig, wanted: RunConfig) -> None:
    """Raise TrainingError if an option differs that may not change when a run is resumed."""
    before, now, free = _by_option(saved), _by_option(wanted), options_that_may_change()
    changed = [
        f"  {option(name)} is {before[name]} in the checkpoint, {now[name]} now"
        for name in before
        if name not in free and before[name] != now[name]
    ]
    if changed:
        raise TrainingError(
            "--resume goes on with the same run, but\n"
            + "\n".join(changed)
            + f"\nonly these may change: {', '.join(map(option, free))}"
        )


def _by_option(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {"model": tree.pop("model")} | {name: value for section in tree.values() for name, value in section.items()}


def _summary(
    config: RunConfig, unit: str, trainer: Trainer, results: dict[str, Any], phases: dict[str, float], ranks: Ranks
) -> dict[str, Any]:
    device = ranks.device
    final = {
        f"final_{name}": trainer.last_metrics[name] for name in ("loss", "accuracy") if name in trainer.last_metrics
    }
    return {
        "model": config.model,
        "dataset": config.data.dataset,
        **results,
        **final,
        "steps": trainer.step,
        f"{unit}_per_second": round(trainer.step * trainer.mean_batch / max(trainer.seconds, 1e-9), 2),
        "peak_memory_bytes": _peak_memory_bytes(device),
        "training_seconds": round(trainer.seconds, 3),
        "phase_seconds": {name: round(seconds, 3) for name, seconds in phases.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "processes": ranks.world_size,
        "threads": torch.get_num_threads(),
        "versions": {"cpc_ext": cpc_ext.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _probed(run: RunDir) -> dict[str, Any]:
    """Return the online probe's [step, accuracy] pairs and its last accuracy; empty if there was no probe."""
    found = [[record["step"], record[PROBED]] for record in read_metrics(run.metrics, having=(PROBED,))]
    return {PROBED: found, f"final_{PROBED}": found[-1][1]} if found else {}


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the device on CUDA, else of the process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        # getrusage would include the peak of the parent process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(results: dict[str, float], phases: dict[str, float], run: RunDir) -> None:
    if "probe_accuracy" in results:
        print(
            f"linear probe: {results['probe_accuracy']:.1%} of the test images "
            f"(the same encoder untrained {results['untrained_probe_accuracy']:.1%}, "
            f"always the same class {results['chance_accuracy']:.1%})"
        )
    for told, of in (("phone", "test frames"), ("speaker", "test recordings")):
        if f"{told}_accuracy" in results:
            beside = f", always the same phone {results[f'chance_{told}_accuracy']:.1%}" if told == "phone" else ""
            print(
                f"linear probe of {told}s: {results[f'{told}_accuracy']:.1%} of the {of} (the same model untrained "
                f"{results[f'untrained_{told}_accuracy']:.1%}, log-mel spectra "
                f"{results[f'log_mel_{told}_accuracy']:.1%}{beside})"
            )
    if "bits_per_dim" in results:
        print(
            f"bits per dimension: {results['bits_per_dim']:.3f} of the held-out images "
            f"(training images {results['train_bits_per_dim']:.3f}, "
            f"best static histogram {results['static_histogram_bits_per_dim']:.3f})"
        )
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()))
    print(f"model, figures and metrics are in {run.path}")


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - started
