"""Distributed training in several processes, as torchrun starts them: rank, collectives and common decisions.

Each process has an equal part of every batch. Gradients and logged values are means over the processes, all processes
take the same decisions, and only the main process writes files and prints. A single process is the main process of one.
"""

from __future__ import annotations

import os
import platform
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cpc_ext.data import BatchShare
from cpc_ext.training.errors import TrainingError

__all__ = ["Ranks", "joined_ranks", "lost_contact"]

# How long a process waits for the others in a step before it takes them for dead. A process that has exited is noticed
# at once, because its connections close.
_STEP_TIMEOUT = timedelta(seconds=45)
# Timeout while only the main process works, as when it draws samples, and while data are loaded.
_PATIENT_TIMEOUT = timedelta(hours=12)
# Parts of gloo's and NCCL's error messages about a lost process; their exception classes differ between versions.
_LOST = ("gloo", "nccl", "by peer", "by remote peer", "timed out", "broken pipe", "tcpstore", "process group")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as seen from this one.

    Attributes:
        device: the device of this process.
        rank: rank of this process, from 0.
        world_size: number of processes.
        pipeline: True if each process trains one part of the model on whole batches, instead of the whole model on a
            part of each batch.
        siblings: process IDs of the other processes that the same torchrun started.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    pipeline: bool = False
    siblings: tuple[int, ...] = ()
    _control: Any = None
    _patient: Any = None

    @property
    def main(self) -> bool:
        """True in the main process, which writes the files."""
        return self.rank == 0

    @property
    def share(self) -> BatchShare:
        """This process's share of a batch."""
        return BatchShare() if self.pipeline else BatchShare(self.rank, self.world_size)

    def say(self, text: str) -> None:
        """Print in the main process only."""
        if self.main:
            print(text, flush=True)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return means over the processes that share a batch, without gradient. Does not wait for the device."""
        if self.share.world_size == 1:
            return values
        stacked = torch.stack([value.detach().float() for value in values.values()]) / self.world_size
        dist.all_reduce(stacked)
        return dict(zip(values, stacked.unbind(), strict=True))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control)
        return bool(flags)

    def first(self, step: int | None) -> int | None:
        """Return the lowest step over all processes, or None if no process has one."""
        if self.world_size == 1:
            return step
        none = torch.iinfo(torch.int64).max
        lowest = torch.tensor(none if step is None else step)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._control)
        return None if int(lowest) == none else int(lowest)

    def any_before(self, flag: bool, pending: deque[tuple[Any, Tensor]], delay: int) -> bool:
        """Return whether the flag was set in any process ``delay`` calls ago, so that no process waits for the others.

        Args:
            flag: the flag of this call.
            pending: the calls whose result is not yet used, kept by the caller; empty before the first call. At the end
                the caller must wait for those that remain.
            delay: number of calls by which the result lags behind.
        """
        flags = torch.tensor(int(flag))
        pending.append((dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control, async_op=True), flags))
        if len(pending) <= delay:
            return False
        work, flags = pending.popleft()
        work.wait()
        return bool(flags)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of ranks, in every process; values must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Return the same as :meth:`gather` in the main process, and None in the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.main else None
        dist.gather_object(value, values, dst=0, group=self._patient)
        return values

    def wait(self) -> None:
        """Wait until all processes have called this, with the long timeout."""
        if self.world_size > 1:
            dist.barrier(group=self._patient)

    def end_stopped(self) -> None:
        """Kill siblings that are stopped (SIGSTOP, a debugger) when the other processes end.

        They do not react to torchrun's SIGTERM, and torchrun would wait 30 s for each before it kills them itself.
        """
        for process in self.siblings:
            with suppress(OSError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t"):
                    os.kill(process, signal.SIGKILL)

    def on_main(self, action: Callable[[], T]) -> T:
        """Call ``action`` in the main process while the others wait; return its result, which must pickle, in all.

        If it raises, the main process re-raises, and the others exit silently by SystemExit with status 1.
        """
        if self.world_size == 1:
            return action()
        answer: list[Any] = [None]
        if self.main:
            try:
                answer = [(True, action())]
            except BaseException:
                dist.broadcast_object_list([(False, None)], src=0, group=self._patient)
                raise
        dist.broadcast_object_list(answer, src=0, group=self._patient)
        result: T
        succeeded, result = answer[0]
        if not succeeded:
            raise SystemExit(1)
        return result


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun started; without torchrun, this is the only process.

    Args:
        device: the device's name on the command line. With "cuda", each process takes the GPU of its local rank.

    Raises:
        TrainingError: the processes do not find each other, or cannot use that device together.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        yield Ranks(torch.device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    mine = torch.device(device)
    if mine.type not in ("cpu", "cuda") or mine.index is not None:
        raise TrainingError(f"--device: several processes compute on cpu or cuda, got {device}")
    if mine.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"--device cuda: {torch.cuda.device_count()} GPUs for the process of number {local_rank}; start as "
                "many processes as there are, or give --device cpu"
            )
        mine = torch.device("cuda", local_rank)
        torch.cuda.set_device(mine)
    try:
        dist.init_process_group("gloo" if mine.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=_STEP_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=_STEP_TIMEOUT)
        patient = dist.new_group(backend="gloo", timeout=_PATIENT_TIMEOUT)
        siblings = _siblings(world_size, control)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the {world_size} processes of this run did not find each other: {error}") from None
    yield Ranks(mine, rank, world_size, siblings=siblings, _control=control, _patient=patient)
    # Not after an error: destroying the group may wait for processes that are gone.
    dist.destroy_process_group()


def _siblings(world_size: int, group: Any) -> tuple[int, ...]:
    """Return the process IDs of the other processes on this machine with the same parent."""
    mine = (platform.node(), os.getppid(), os.getpid())
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, mine, group=group)
    return tuple(each[2] for each in found if each[:2] == mine[:2] and each != mine)


def lost_contact(error: Exception) -> bool:
    """Return whether an error in a step means that another process is gone, rather than a fault of this one."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
