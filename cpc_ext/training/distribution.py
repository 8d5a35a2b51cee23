"""Several processes that train one model, as torchrun starts them: which one this is, and how they agree.

Each process holds an equal part of every batch. Gradients and what is logged are means over the processes, decisions
are taken by all alike, and only the main process writes files and talks. A process on its own is the main one of one.
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

# How long a process waits for the others in a step before it takes them for dead. One that has really ended is noticed
# at once, as its connections close.
_STEP_TIMEOUT = timedelta(seconds=45)
# For work that only the main process does, such as drawing samples, and for loading data.
_PATIENT_TIMEOUT = timedelta(hours=12)
# How the errors of gloo and NCCL, whose classes differ between versions, speak of a process that is gone.
_LOST = ("gloo", "nccl", "by peer", "by remote peer", "timed out", "broken pipe", "tcpstore", "process group")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as this one sees them.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        device: where this one computes.
        pipeline: each process trains a part of the model on whole batches, instead of all of it on a part of each.
        siblings: the others that the same torchrun started, by their process numbers.
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
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def share(self) -> BatchShare:
        """This process's part of a batch."""
        return BatchShare() if self.pipeline else BatchShare(self.rank, self.world_size)

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.main:
            print(text, flush=True)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes that share a batch; without gradient. Does not wait for the device."""
        if self.share.world_size == 1:
            return values
        stacked = torch.stack([value.detach().float() for value in values.values()]) / self.world_size
        dist.all_reduce(stacked)
        return dict(zip(values, stacked.unbind(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control)
        return bool(flags)

    def first(self, step: int | None) -> int | None:
        """The lowest step that any process has; None where none has one."""
        if self.world_size == 1:
            return step
        none = torch.iinfo(torch.int64).max
        lowest = torch.tensor(none if step is None else step)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._control)
        return None if int(lowest) == none else int(lowest)

    def any_before(self, flag: bool, pending: deque[tuple[Any, Tensor]], delay: int) -> bool:
        """Whether the flag was set in any process ``delay`` calls ago, so that none has to wait for the others' calls.

        pending: the calls since, empty before the first; the caller keeps it and waits for what is left in the end.
        """
        flags = torch.tensor(int(flag))
        pending.append((dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control, async_op=True), flags))
        if len(pending) <= delay:
            return False
        work, flags = pending.popleft()
        work.wait()
        return bool(flags)

    def gather(self, value: T) -> list[T]:
        """What every process passes, which must pickle, in the order of the ranks, in all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """The same in the main process alone; None in the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.main else None
        dist.gather_object(value, values, dst=0, group=self._patient)
        return values

    def wait(self) -> None:
        """Wait until all processes are here, however long it takes them."""
        if self.world_size > 1:
            dist.barrier(group=self._patient)

    def end_stopped(self) -> None:
        """End siblings that were stopped (SIGSTOP, a debugger), for when the others end.

        They take no notice of torchrun's SIGTERM, and torchrun would wait 30 s for each before it does this itself.
        """
        for process in self.siblings:
            with suppress(OSError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t"):
                    os.kill(process, signal.SIGKILL)

    def on_main(self, action: Callable[[], T]) -> T:
        """What ``action`` returns, which must pickle, in the main process; the others wait for it.

        Where it raises, the main process does; the others leave without a word, by SystemExit with status 1.
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
    """Join the processes that torchrun started; the only one where it did not.

    device: its name on the command line; of several GPUs each process of a machine takes the one of its number.

    Raises TrainingError where the processes do not find each other or cannot share that device.
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
    # Not after an error: taking leave of processes that are gone may wait for them.
    dist.destroy_process_group()


def _siblings(world_size: int, group: Any) -> tuple[int, ...]:
    """The other processes of this machine that have the same parent."""
    mine = (platform.node(), os.getppid(), os.getpid())
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, mine, group=group)
    return tuple(each[2] for each in found if each[:2] == mine[:2] and each != mine)


def lost_contact(error: Exception) -> bool:
    """Whether an error of a step means that another process is gone, not that something is wrong here."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
