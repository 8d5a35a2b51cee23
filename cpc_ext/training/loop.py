"""The training loop: steps, learning rate, logging and checkpoints for any task.

The host only ever waits for the device where something is logged or saved. There it also learns whether a value was
not finite, so that neither a log line nor a checkpoint is made of such values without its knowledge. Several processes
take the same steps; what is measured is averaged over them at once, so that all decide alike.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cpc_ext.data.sampler import BatchTooLargeError
from cpc_ext.training.atomic_file import replace_with_link
from cpc_ext.training.checkpoint import load_weights, save_checkpoint
from cpc_ext.training.config import RunConfig, option
from cpc_ext.training.data_record import data_record, differences
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import EncodingsNotFiniteError, TooFewExamplesError, TrainingError, warn, writing
from cpc_ext.training.meter import FiniteGuard, Meter
from cpc_ext.training.parts import Parts
from cpc_ext.training.pipeline import Pipeline
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog
from cpc_ext.training.schedule import learning_rate
from cpc_ext.training.stop_request import StopRequest
from cpc_ext.training.task import Fetcher, Task
from cpc_ext.training.time_budget import FirstSteps

__all__ = ["Trainer"]

T = TypeVar("T")

# When a run is asked whether it learns anything: after a twentieth of its steps, within these bounds.
_ASKED = (200, 2000)
# From how many hours on a run without a GPU is warned of.
_HOURS = 1.0
# What the progress bar has room for, among what is logged.
_SHOWN = ("loss", "accuracy", "bits_per_dim")


class Trainer:
    """One run of a task, from its first step or from a checkpoint's.

    With several processes every one makes a trainer of an equal task. Batch norm takes its statistics of all of a batch
    on CUDA; elsewhere, where PyTorch cannot, of each process's part.

    Attributes:
        step: updates done.
        total_steps: updates of the whole run.
        seconds: time spent in steps so far, over all resumed parts.
        last_metrics: the last logged record.
        mean_batch: examples of a batch, of all processes, in the mean.

    Raises:
        TooFewExamplesError: a batch larger than the data set.
        TrainingError: a batch that the processes cannot share equally, or examples that make none.
    """

    def __init__(self, task: Task, config: RunConfig, run: RunDir, ranks: Ranks) -> None:
        options = config.optimization
        device = ranks.device
        self._ranks = ranks
        self._task = task
        task.share = ranks.share
        self._config = config
        self._run = run
        self._device = device
        try:
            self._sampler = task.sampler(
                options.batch_size,
                seed=config.compute.seed,
                rank=ranks.share.rank,
                world_size=ranks.share.world_size,
            )
        except ValueError as error:
            name, _, reason = str(error).partition(": ")
            said = f"{option(name)}: {reason}"
            if isinstance(error, BatchTooLargeError):
                raise TooFewExamplesError(said, error.most) from None
            raise TrainingError(said) from None
        self.mean_batch = self._sampler.mean_batch
        self._data = data_record(task.examples)
        self._streams = RandomStreams(config.compute.seed, device, ranks.share, rank=ranks.rank)
        if ranks.share.world_size > 1:
            self._share_batch_norm()
        if config.compute.compile:
            task.compile()
        self._parts = (Pipeline if ranks.pipeline else Parts)(task, config, ranks)
        self._parameters = [parameter for learner in self._parts.learners for parameter in learner.parameters]
        self._guard = FiniteGuard(device)
        self._since_log = Meter(device)
        self._since_best = Meter(device)
        self._meters = {"since_log": self._since_log, "since_best": self._since_best}
        self._best_loss = float("inf")
        self._saved_step: int | None = None
        self.step = 0
        self.total_steps = options.steps or (options.epochs or 0) * len(self._sampler)
        self.seconds = 0.0
        self._started = 0.0
        self._logged_step = 0
        self._logged_seconds = 0.0
        self.last_metrics: dict[str, float] = {}

    def timed_steps(self) -> Callable[[int], float]:
        """What takes that many steps, waits until they are done, and tells the seconds of the slowest process.

        For measuring: the trainer has no length then, writes nothing, and is of no other use after it.
        """
        self._task.model.train()
        self.total_steps = sys.maxsize
        batches = self._batches()
        fetch = self._task.fetcher(self._device, self._streams)

        def take(steps: int) -> float:
            started = time.perf_counter()
            for _ in range(steps):
                self._update(next(batches), fetch)
            self._guard.first_bad_step()  # It waits for the device.
            return max(self._ranks.gather(time.perf_counter() - started))

        return take

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint: parameters and buffers, Adam's two moments of each parameter, the task's own state."""
        trained = [parameter for part in self._parts.modules for parameter in part.parameters()]
        tensors = [*trained, *trained, *self._task.model.state_dict().values()]
        tensors += [value for value in self._task.state_dict().values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. TrainingError where it does not fit this run, or is of other examples."""
        with self._fitting():
            self._check_data(state)
            load_weights(self._task.model, state["model"])
            self._task.load_state_dict(state.get("task", {}))
            self._task.carry_on({name: self._ranks.share.part(rows) for name, rows in state.get("carried", {}).items()})
            self._parts.load_state_dict(state, self._meters)
            self._streams.load_state_dict(state["streams"])
            if any(type(value) is not int for value in state["sampler"].values()):
                raise TypeError(f"sampler: expected whole numbers, got {state['sampler']}")
            self._sampler.load_state_dict(state["sampler"])
            self._best_loss = state["best_loss"]
            self.seconds = state["seconds"]
            self.last_metrics = state["last_metrics"]
            self.step = self._saved_step = state["step"]
        if self.total_steps < self.step:
            raise TrainingError(
                f"--resume: the run is already at step {self.step}, past the {self.total_steps} asked for"
            )

    def take_weights(self, state: dict[str, Any]) -> None:
        """Give the model the weights of a checkpoint and nothing else. TrainingError where they do not fit this run."""
        with self._fitting():
            load_weights(self._task.model, state["model"])

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """An error in the block means that the checkpoint does not fit this run: TrainingError."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise TrainingError(f"--resume: {self._run.checkpoint} does not fit this run: {reason}") from None

    def _check_data(self, state: dict[str, Any]) -> None:
        """TrainingError where the examples are others than those that the run was trained on so far."""
        # A checkpoint of before there was a record knows their number.
        then = state.get("data") or {"images": state["sampler"]["count"]}
        changed = differences(then, self._data)
        said = f"the data changed since step {state['step']} was saved: {', '.join(changed)}"
        if changed in (["other pixels"], ["other sound"]):
            # Also another version of the decoder makes others of the same files.
            if self._ranks.main:
                warn(f"--resume: {said}")
        elif changed:
            raise TrainingError(
                f"--resume: {said}. Go on with the {self._task.unit} as they were, or start a new run from its weights "
                f"with --resume-from {shlex.quote(str(self._run.path))}"
            )

    def train(self, log: RunLog | None, stop: StopRequest, *, forecast: bool = False) -> None:
        """Run to the last step, or to the one in which ``stop`` is set in any process; then save.

        log: of the main process; None in the others.
        forecast: after the first steps warn of a run that takes hours without a GPU.

        Raises TrainingError where a loss or gradient is not finite, with the checkpoints before that as they were, and
        where the last step cannot be saved.
        """
        options = self._config.output
        self._task.model.train()
        if self.step == 0:
            # From here on there is something to resume, and the disk has proved to take a checkpoint.
            state = self._state()
            self._ranks.on_main(lambda: self._save_first(state))
            self._saved_step = 0
        batches = self._batches()
        fetch = self._task.fetcher(self._device, self._streams)
        self._logged_step, self._logged_seconds = self.step, self.seconds
        fewest, most = _ASKED
        asked_at = min(max(fewest, self.total_steps // 20), most)
        asked = self.step >= asked_at
        first = FirstSteps() if forecast and self._ranks.main and self._device.type == "cpu" else None
        self._start_clock()
        # Where the bar is not redrawn but written line after line, a few lines a minute are enough.
        interval = 0.2 if sys.stderr.isatty() else 10
        with tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            disable=not self._ranks.main,
        ) as bar:
            if self.step == 0 and self._task.observe_start:
                with _measuring(bar):
                    self._observe(log)
            while self.step < self.total_steps and not self._parts.any(stop.signal is not None):
                began = time.perf_counter()
                self._update(next(batches), fetch)
                if first is not None and (pace := first.pace(time.perf_counter() - began)) is not None:
                    first = None
                    self._warn_of_hours(pace)
                bar.update()
                if self.step % options.log_every == 0 or self.step == self.total_steps:
                    self._log(log, bar)
                    if self.step >= asked_at and not asked:
                        asked = True
                        self._warn_of_trouble()
                every = self._task.observe_every
                if every is not None and (self.step % every == 0 or self.step == self.total_steps):
                    with _measuring(bar):
                        self._observe(log)
                if self.step % options.checkpoint_every == 0 or self.step == self.total_steps:
                    self._save(log, complete_interval=True)
            error = None
            if self._saved_step != self.step:
                # Where that failed a moment ago, there may be room again.
                error = self._save(log, complete_interval=False)
        if error is not None:
            if not self._ranks.main:
                raise SystemExit(1)  # The main process says why.
            raise TrainingError(
                f"step {self.step} of {self.total_steps} could not be saved ({error}): make room; {self.on_disk()}"
            )
        self._parts.finish()

    def on_disk(self) -> str:
        """What there is of the run, and how to go on with it."""
        if not self._run.checkpoint.is_file():
            gone = "is gone" if not self._run.path.is_dir() else "holds no checkpoint any more"
            return f"{self._run.path} {gone}, and with it the training"
        return f"{self._run.checkpoint} holds step {self._saved_step}, from which {self._run.resuming} goes on"

    def _save_first(self, state: dict[str, Any]) -> None:
        with writing(self._run.checkpoint, "--out-dir"):
            save_checkpoint(self._run.checkpoint, state)

    def _share_batch_norm(self) -> None:
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self._task.model.modules()):
            return
        if self._device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self._task.model)
        elif self._ranks.main:
            warn("batch norm takes its statistics of each process's part of a batch on the CPU; --norm layer does not")

    def _batches(self) -> Iterator[np.ndarray]:
        while True:
            yield from self._sampler

    def _update(self, batch: np.ndarray, fetch: Fetcher) -> None:
        """One step; it waits for the device no more than a learner's update."""
        self.step += 1
        measured = self._parts.update(
            self.step,
            batch,
            fetch,
            self._streams,
            learning_rate=self._learning_rate(self.step),
            guard=self._guard,
        )
        self._task.updated()
        self._since_log.add(measured)
        self._since_best.add({name: measured[name] for name in self._parts.losses})

    def _learning_rate(self, step: int) -> float:
        options = self._config.optimization
        return learning_rate(
            step,
            peak=options.lr,
            total_steps=self.total_steps,
            warmup_steps=options.warmup_steps,
            schedule=options.schedule,
            floor=options.final_lr,
        )

    def _log(self, log: RunLog | None, bar: tqdm[NoReturn]) -> None:
        means = self._parts.means(self._since_log)
        self._since_log.reset()
        self._check_finite(parameters=False)
        # What else is not finite is the norm of gradients that overflowed in fp16, for which JSON has no numbers.
        means = {name: value for name, value in means.items() if math.isfinite(value)}
        self._stop_clock()
        examples = (self.step - self._logged_step) * self.mean_batch
        speed = examples / max(self.seconds - self._logged_seconds, 1e-9)
        self._logged_step, self._logged_seconds = self.step, self.seconds
        self.last_metrics = {
            "step": self.step,
            "epoch": round(self.step / len(self._sampler), 4),
            **means,
            "lr": self._learning_rate(self.step),
            f"{self._task.unit}_per_second": round(speed, 2),
            "seconds": round(self.seconds, 3),
        }
        if log is not None:
            log.log(self.last_metrics)
        shown = {name: f"{value:.3f}" for name, value in means.items() if name in _SHOWN}
        bar.set_postfix({**shown, f"{self._task.unit}/s": f"{speed:.0f}"}, refresh=False)

    def _warn_of_hours(self, pace: float) -> None:
        """Say how long the run takes at this many seconds a step, where that is not what one waits for."""
        hours = pace * self.total_steps / 3600
        if hours >= _HOURS:
            warn(
                f"without a GPU the {self.total_steps} steps of this run, of about {pace:.3g} s each, take about "
                f"{hours:.2g} hours. Ctrl-C ends it; shorter are runs with {', or '.join(self._config.shortcuts())}"
            )

    def _warn_of_trouble(self) -> None:
        """Say where the last line of the log, and the encodings, are those of a run that learns nothing."""
        trouble = self._looked(lambda: self._task.trouble(self.last_metrics))
        if trouble is not None and self._ranks.main:
            warn(f"step {self.step} of {self.total_steps}: {trouble}")

    def _observe(self, log: RunLog | None) -> None:
        """Log what the task finds when it looks at the model; that is no part of the time spent in steps."""

        def observe() -> None:
            assert log is not None  # The main process has one.
            sample = self._run.sample(self.step)
            try:
                log.log({"step": self.step, **self._task.observe(self.step, self._run)}, group="observed")
                if sample.is_file():
                    log.images(self.step, [sample])
            except OSError as error:
                warn(f"could not write what was observed at step {self.step} ({error}); training goes on without")
            except EncodingsNotFiniteError as error:
                warn(f"nothing was observed at step {self.step}: {error}; training goes on")

        self._looked(observe)

    def _looked(self, look: Callable[[], T]) -> T:
        """What the main process finds when it looks at the model, in time that is not counted."""
        self._stop_clock()
        if self._ranks.pipeline:
            self._parts.bring_weights()
        self._task.model.eval()
        found = self._ranks.on_main(look)
        self._task.model.train()
        self._start_clock()
        return found

    def _save(self, log: RunLog | None, *, complete_interval: bool) -> str | None:
        """Write the last checkpoint, and let it be the best one too if its interval's mean loss is the lowest.

        An interval cut short by a stop does not count: a mean over few steps is low by luck.

        Returns, in all processes, why that could not be done, which a warning says as well; None where it was.
        """
        self._stop_clock()
        self._check_finite(parameters=True)
        before = self._best_loss
        if complete_interval:
            self._best_loss = min(before, self._parts.means(self._since_best).get("loss", float("inf")))
            self._since_best.reset()
        state = self._state()
        error = self._ranks.on_main(lambda: self._write(log, state, best=self._best_loss < before))
        if error is None:
            self._saved_step = self.step
        else:
            self._best_loss = before
        self._start_clock()
        return error

    def _write(self, log: RunLog | None, state: dict[str, Any], *, best: bool) -> str | None:
        """The writing itself, in the main process."""
        assert log is not None
        # A checkpoint never knows of logged steps that are not on the disk.
        log.sync()
        try:
            if best:
                # First, as after a kill in between the run finds its best interval again; a last checkpoint that is
                # written first would know of a best one that is not there.
                save_checkpoint(self._run.best, state)
                replace_with_link(self._run.best, self._run.checkpoint)
            else:
                save_checkpoint(self._run.checkpoint, state)
        except OSError as error:
            warn(f"could not save step {self.step} ({error}); the last checkpoint is that of step {self._saved_step}")
            return str(error)
        return None

    def _check_finite(self, *, parameters: bool) -> None:
        """Stop where a loss or gradient since the start, or a parameter now, is not finite."""
        step = self._guard.first_bad_step()
        if step is None and any(learner.diverged for learner in self._parts.learners):
            step = self.step
        if step is None and parameters:
            finite = torch.stack([value.isfinite().all() for value in self._parameters]).all()
            step = None if finite else self.step
        step = self._ranks.first(step)
        if step is None:
            return
        state = self._state()
        kept = "" if self._saved_step is None else f"; the checkpoint of step {self._saved_step} is kept"
        if not self._ranks.main:
            raise SystemExit(1)  # The main process, which is here as well, says why.
        try:
            save_checkpoint(self._run.diverged, state)
            kept += f", the state with it is in {self._run.diverged}"
        except OSError as error:
            warn(f"could not save {self._run.diverged} ({error})")
        options = self._config.optimization
        cures = [f"a lower --lr than {options.lr:g}"]
        if options.warmup_steps == 0:
            cures.append("--warmup-steps 500")
        if options.clip_grad is None:
            cures.append("--clip-grad 1")
        if self._config.compute.precision != "fp32":
            cures.append("--precision fp32")
        raise TrainingError(
            f"training diverged: the loss or its gradient is not finite at step {step} "
            f"(learning rate {self._learning_rate(step):g}){kept}. Try {', or '.join(cures)}"
        )

    def _state(self) -> dict[str, Any]:
        """All that a checkpoint holds; complete in the main process. All processes call it."""
        learned = self._parts.state_dict(self._meters)  # In a pipeline it brings the weights of all parts.
        return {
            "step": self.step,
            "config": self._config.model_dump(mode="json"),
            "description": self._task.description(),
            "model": self._task.model.state_dict(),
            "task": self._task.state_dict(),
            "carried": self._carried(),
            **learned,
            "streams": self._streams.state_dict(self._ranks.gather_on_main),
            "sampler": self._sampler.state_dict(),
            "data": self._data,
            "best_loss": self._best_loss,
            "last_metrics": self.last_metrics,
            "seconds": self.seconds,
        }

    def _carried(self) -> dict[str, Tensor]:
        """What the task carries from step to step, of all of the batch in the main process. All processes call it."""
        together: dict[str, Tensor] = {}
        mine = {name: rows.cpu() for name, rows in self._task.carried().items()}
        # Each process of a pipeline has names of its own.
        for found in self._ranks.gather_on_main(mine) or []:
            for name, rows in found.items():
                together[name] = torch.cat([together[name], rows]) if name in together else rows
        return together

    def _start_clock(self) -> None:
        self._started = time.perf_counter()

    def _stop_clock(self) -> None:
        """Count the time since the clock started, or was last read, as training."""
        now = time.perf_counter()
        self.seconds += now - self._started
        self._started = now


@contextmanager
def _measuring(bar: tqdm[NoReturn]) -> Iterator[None]:
    """The bar says, in the block, why it stands still; where it is written line after line, no line is spent on it."""
    redrawn = sys.stderr.isatty()
    bar.set_description("measuring ...", refresh=redrawn)
    yield
    bar.set_description(refresh=redrawn)
