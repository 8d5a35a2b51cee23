"""The option --sweep-step skips combinations in long sweeps of parameters, the same ones on each device."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

from tests.conftest import pytest_collection_modifyitems


class Item:
    """The attributes of a test that the option reads."""

    path = "path"

    def __init__(self, name, **params):
        self.name = self.originalname = name
        if params:
            self.callspec = SimpleNamespace(params=params)


def test_long_sweeps_are_sampled_and_short_ones_whole():
    cpu, emulated = ([Item("long", device=device) for _ in range(17)] for device in ("cpu", "emulated"))
    whole = [*(Item("short", device="cpu") for _ in range(16)), Item("alone"), *(Item("none", n=n) for n in range(16))]
    for step in (1, 5):
        items, told = [*cpu, *whole, *emulated], Mock()
        pytest_collection_modifyitems(SimpleNamespace(getoption={"--sweep-step": step}.get, hook=told), items)
        assert items == [*cpu[::step], *whole, *emulated[::step]]
        deselected = [item for call in told.pytest_deselected.mock_calls for item in call.kwargs["items"]]
        assert len(items) + len(deselected) == len(cpu) + len(whole) + len(emulated)
