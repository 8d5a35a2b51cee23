"""Conversion of docstrings for the site by docs/conf.py."""

from __future__ import annotations

import inspect
import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest

import cpc_ext

pytest.importorskip("sphinx.application", reason="needs cpc_ext[docs]")
pytest.importorskip("huggingface_hub", reason="needs cpc_ext[docs]")
CONF = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "conf.py"))
PUBLIC = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module in CONF["_public_modules"]()
    for name in module.__all__
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
]


def sections_of(thing: type) -> list[str]:
    lines = (inspect.getdoc(thing) or "").splitlines()
    CONF["_in_sections"](None, "class" if inspect.isclass(thing) else "function", thing.__name__, thing, None, lines)
    return lines


@pytest.mark.parametrize("thing", PUBLIC)
def test_all_that_is_told_of_arguments_is_in_their_list(thing):
    """Also where a line tells of several, together or one after the other."""
    names = CONF["_documented_names"](thing)
    for line in sections_of(thing):
        for told in re.findall(r"(?:^|\. )(\w+(?:, \w+)*): \S", line):
            assert not names.issuperset(told.split(", ")), line


@pytest.mark.parametrize("thing", PUBLIC)
def test_nothing_returned_is_taken_for_a_type(thing):
    """As what stands before a colon in the first line of that section is."""
    lines = sections_of(thing)
    for heading, line in pairwise(lines):
        if heading in ("Returns:", "Yields:"):
            assert ": " not in re.sub(r"(:\w+:)?`[^`]*`", "", line)


def test_arguments_that_share_a_line():
    lines = sections_of(cpc_ext.data.Dataset)
    assert "    mean, std: per channel, with pixels in 0..1." in lines
    assert "    gray_mean, gray_std: the same of the ITU-R 601 grey image." in lines
