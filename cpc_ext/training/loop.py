"""The training loop: steps, learning rate, logging and checkpoints for any task.

The host waits for the device only where it logs, observes or saves, and in fp16 for optimizers that are not fused.
Before it logs or saves it checks for values that are not finite, so that none gets into a log line or a checkpoint
unnoticed. Several processes take the same steps and average their measurements at once, so that all decide alike.
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
from cpc_ext.training.optimizers import buffers_per_parameter
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

# A run is checked once for not learning: after a twentieth of its steps, clamped to these bounds.
_ASKED = (200, 2000)
# A run without a GPU that is expected to take at least this many hours causes a warning.
_HOURS = 1.0
# The logged scalars that the progress bar shows.
_SHOWN = ("loss", "accuracy", "bits_per_dim")


class Trainer:
    """Runs a task from its first step or from a checkpoint.

    With several processes, each creates a trainer of the same task. On CUDA, batch norm then computes its statistics
    over the whole batch; on the CPU, where PyTorch cannot do that, over each process's part of it.

    Attributes:
        step: number of updates done.
        total_steps: number of updates in the whole run.
        seconds: time spent in steps so far, including those before the run was resumed.
        last_metrics: the last logged record.
        mean_batch: mean number of examples in a batch, over all processes.

    Raises:
        TooFewExamplesError: the batch is larger than the data set.
        TrainingError: the processes cannot share a batch equally, or the examples do not make one.
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
        """Return a function that takes the given number of steps and returns the seconds of the slowest process.

        The function waits for the device. This is for measuring only: the trainer has no last step any more, writes
        nothing, and must not be used to train afterwards.
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
        """Size of a checkpoint in bytes: parameters and buffers, the optimizer's buffers, the task's state."""
        trained = [parameter for part in self._parts.modules for parameter in part.parameters()]
        tensors = [*self._task.model.state_dict().values(), *trained * buffers_per_parameter(self._config.optimization)]
        tensors += [value for value in self._task.state_dict().values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def resume(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint.

        Raises TrainingError if it does not fit this run, or if the run was trained on other examples so far.
        """
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
        """Load only the model's weights from a checkpoint. Raises TrainingError if they do not fit this run."""
        with self._fitting():
            load_weights(self._task.model, state["model"])

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Raise errors in the block as a TrainingError that says that the checkpoint does not fit this run."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise TrainingError(f"--resume: {self._run.checkpoint} does not fit this run: {reason}") from None

    def _check_data(self, state: dict[str, Any]) -> None:
        """Raise TrainingError if the examples changed since the checkpoint; warn if only their decoded content did."""
        # Checkpoints from before the record was introduced hold only the number of examples.
        then = state.get("data") or {"images": state["sampler"]["count"]}
        changed = differences(then, self._data)
        said = f"the data changed since step {state['step']} was saved: {', '.join(changed)}"
        if changed in (["other pixels"], ["other sound"]):
            # Another version of the decoder may decode the same files differently.
            if self._ranks.main:
                warn(f"--resume: {said}")
        elif changed:
            raise TrainingError(
                f"--resume: {said}. Go on with the {self._task.unit} as they were, or start a new run from its weights "
                f"with --resume-from {shlex.quote(str(self._run.path))}"
            )

    def train(self, log: RunLog | None, stop: StopRequest, *, forecast: bool = False) -> None:
        """Train to the last step, or until ``stop`` is set in any process; then save.

        Args:
            log: the run's log in the main process, None in the others.
            stop: the request to stop, which is checked between steps.
            forecast: warn after the first steps if the run will take hours without a GPU.

        Raises:
            TrainingError: a loss, gradient or parameter is not finite, in which case earlier checkpoints are kept; or
                the last step cannot be saved.
        """
        options = self._config.output
        self._task.model.train()
        if self.step == 0:
            # Save at once: the run can then be resumed from any point, and a disk that takes no checkpoint fails now.
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
        # Outside a terminal every update of the bar is a new line, and a few lines a minute are enough.
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
                # Try again even if a save at this step has just failed: the disk may have room by now.
                error = self._save(log, complete_interval=False)
        if error is not None:
            if not self._ranks.main:
                raise SystemExit(1)  # The main process says why.
            raise TrainingError(
                f"step {self.step} of {self.total_steps} could not be saved ({error}): make room; {self.on_disk()}"
            )
        self._parts.finish()

    def on_disk(self) -> str:
        """Return a message that says which checkpoint is on disk and how to resume from it."""
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
        """Take one step; it waits for the device only where :meth:`Learner.update` does."""
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
        # Now only the norm of gradients that overflowed in fp16 can still be infinite or NaN, which JSON cannot hold.
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
        """Warn if the run takes hours at this pace, in seconds per step."""
        hours = pace * self.total_steps / 3600
        if hours >= _HOURS:
            warn(
                f"without a GPU the {self.total_steps} steps of this run, of about {pace:.3g} s each, take about "
                f"{hours:.2g} hours. Ctrl-C ends it; shorter are runs with {', or '.join(self._config.shortcuts())}"
            )

    def _warn_of_trouble(self) -> None:
        """Warn if the task finds, from the last logged means and the model, that the run learns nothing."""
        trouble = self._looked(lambda: self._task.trouble(self.last_metrics))
        if trouble is not None and self._ranks.main:
            warn(f"step {self.step} of {self.total_steps}: {trouble}")

    def _observe(self, log: RunLog | None) -> None:
        """Log the results of the task's :meth:`Task.observe`; this does not count as time spent in steps."""

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
        """Call ``look`` in the main process, with the model in evaluation mode and the clock stopped.

        Returns its result in all processes.
        """
        self._stop_clock()
        if self._ranks.pipeline:
            self._parts.bring_weights()
        self._task.model.eval()
        found = self._ranks.on_main(look)
        self._task.model.train()
        self._start_clock()
        return found

    def _save(self, log: RunLog | None, *, complete_interval: bool) -> str | None:
        """Write the last checkpoint, and make it the best one too if its interval's mean loss is the lowest so far.

        An interval cut short by a stop does not count, because a mean over few steps can be low by chance.

        Returns, in all processes, the reason why saving failed, which a warning also gives, or None if it succeeded.
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
        """Write the checkpoint; called in the main process. Returns the reason if that fails, as :meth:`_save` does."""
        assert log is not None
        # Sync first, so that every step that the checkpoint counts as logged is on disk.
        log.sync()
        try:
            if best:
                # Write the best checkpoint first. After a kill in between, the resumed run repeats the interval and
                # finds it best again. In the other order, the last checkpoint would record a best loss whose
                # checkpoint does not exist.
                save_checkpoint(self._run.best, state)
                replace_with_link(self._run.best, self._run.checkpoint)
            else:
                save_checkpoint(self._run.checkpoint, state)
        except OSError as error:
            warn(f"could not save step {self.step} ({error}); the last checkpoint is that of step {self._saved_step}")
            return str(error)
        return None

    def _check_finite(self, *, parameters: bool) -> None:
        """Raise TrainingError if a loss or gradient since the start was not finite; ``parameters``: check them too."""
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
        """Return the contents of a checkpoint, complete in the main process only. All processes must call it."""
        learned = self._parts.state_dict(self._meters)  # In a pipeline this also collects the weights of all parts.
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
        """Return what the task carries from step to step, in the main process for the whole batch.

        All processes must call it.
        """
        together: dict[str, Tensor] = {}
        mine = {name: rows.cpu() for name, rows in self._task.carried().items()}
        # In a pipeline the names differ between processes.
        for found in self._ranks.gather_on_main(mine) or []:
            for name, rows in found.items():
                together[name] = torch.cat([together[name], rows]) if name in together else rows
        return together

    def _start_clock(self) -> None:
        self._started = time.perf_counter()

    def _stop_clock(self) -> None:
        """Add the time since the clock was started or last read to the training time."""
        now = time.perf_counter()
        self.seconds += now - self._started
        self._started = now


@contextmanager
def _measuring(bar: tqdm[NoReturn]) -> Iterator[None]:
    """Let the progress bar show "measuring ..." during the block; outside a terminal this prints no line of its own."""
    redrawn = sys.stderr.isatty()
    bar.set_description("measuring ...", refresh=redrawn)
    yield
    bar.set_description(refresh=redrawn)
