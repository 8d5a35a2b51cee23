"""Ranks that run as threads; messages arrive when a rank waits for them."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cpc_ext.nn import across_ranks

PATIENCE_SECONDS = 5


class Received:
    def __init__(self, mail, values):
        self.mail, self.values = mail, values

    def wait(self):
        self.values.copy_(self.mail.get(timeout=PATIENCE_SECONDS))


class Threads:
    """The functions of ``torch.distributed`` that the package uses, for ranks that run as threads."""

    isend, irecv = "isend", "irecv"

    def __init__(self, world):
        self.world, self.mine = world, threading.local()
        self.meeting = threading.Barrier(world, timeout=PATIENCE_SECONDS)
        self.brought, self.messages = [None] * world, 0
        self.mail = {(one, other): queue.Queue() for one in range(world) for other in range(world)}

    def run(self, program):
        """Run the program on every rank, and return the results."""

        def as_rank(rank):
            self.mine.rank = rank
            return program(rank)

        with ThreadPoolExecutor(self.world) as threads:
            return list(threads.map(as_rank, range(self.world)))

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.mine.rank

    def get_world_size(self):
        return self.world

    def all_gather(self, parts, values):
        assert values.is_contiguous()
        self.brought[self.mine.rank] = values.clone()
        self.meeting.wait()
        for part, value in zip(parts, self.brought, strict=True):
            assert part.is_contiguous()
            part.copy_(value)
        self.meeting.wait()

    def all_reduce(self, values):
        parts = [torch.empty_like(values) for _ in range(self.world)]
        self.all_gather(parts, values)
        values.copy_(sum(parts))

    def P2POp(self, operation, values, peer):
        return operation, values, peer

    def batch_isend_irecv(self, operations):
        received = []
        for operation, values, peer in operations:
            if operation == self.isend:
                self.messages += 1
                self.mail[self.mine.rank, peer].put(values)
            else:
                received.append(Received(self.mail[peer, self.mine.rank], values.fill_(torch.nan)))
        return received


@pytest.fixture(params=[1, 2, 3])
def ranks(request, monkeypatch):
    threads = Threads(request.param)
    monkeypatch.setattr(across_ranks, "dist", threads)
    return threads
