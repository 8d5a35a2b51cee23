"""The charts of ops: which files are drawn."""

from __future__ import annotations

import charts
import numpy as np
import pytest
from PIL import Image

SIZES = {"first": "images", "second": "rows"}


def row(op, size, dtype="float32", names=("eager", "ours", "Pillow")):
    figures = {"against_eager": 2.0 * (size or 1), "peak_extra_bytes": 2**20 * (size or 1)}
    alternatives = dict.fromkeys(names, figures)
    return {"op": op, "size": size, "dtype": dtype, "passes": "forward", "alternatives": alternatives}


def test_each_op_and_type_has_a_file_of_its_own(tmp_path):
    rows = [row("first", size, dtype) for size in (1, 4) for dtype in ("float32", "bfloat16")]
    rows += [row("second", 8), row("second", None), row("unswept", None)]
    charts.draw_kernels(rows, SIZES, {"device": "a machine"}, tmp_path / "kernels.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["kernels-first-bfloat16.png", "kernels-first-float32.png", "kernels-second.png"]
    for path in tmp_path.iterdir():
        pixels = np.array(Image.open(path).convert("RGB"))
        assert pixels.shape[1] <= 1280
        assert (pixels < 128).any()


def test_ours_has_the_same_colour_in_all_charts(tmp_path, monkeypatch):
    legends = []
    monkeypatch.setattr(charts, "_legend", lambda figure, colors, styles: legends.append((colors, list(styles))))
    rows = [row("first", 1, names=("Pillow", "eager", "ours")), row("second", 1, names=("eager", "ours", "one core"))]
    charts.draw_kernels(rows, SIZES, {"device": "a machine"}, tmp_path / "kernels.png")
    (first, passes), (second, _) = legends
    assert passes == ["forward"]
    assert first["ours"] == second["ours"]
    assert first["eager"] == second["eager"]
    for colors in (first, second):
        assert len(set(colors.values())) == len(colors) == 3


def test_failures_are_percentages_over_steps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "_save", lambda figure, path: drawn.append(figure))
    run = {"found": [[0, 0.1], [4, 0.5]], "neighbours": [[0, 0.2], [4, 0.3]]}
    charts.draw_failures([{"title": "a failure", "wrong": run, "right": run}] * 2, tmp_path / "failures.png")
    panels = drawn[0].get_axes()
    assert [panel.get_ylabel() for panel in panels] == ["targets found, %", "neighbours' class, %"] * 2
    assert [panel.get_xlabel() for panel in panels] == ["", "", "step", "step"]
    assert [list(panel.get_lines()[0].get_ydata()) for panel in panels[:2]] == [[10, 50], [20, 30]]


@pytest.mark.parametrize("names", [("ours", "ours into existing memory")])
def test_what_writes_into_existing_memory_is_not_drawn(tmp_path, monkeypatch, names):
    legends = []
    monkeypatch.setattr(charts, "_legend", lambda figure, colors, styles: legends.append(colors))
    charts.draw_kernels([row("first", 1, names=names)], SIZES, {"device": "a machine"}, tmp_path / "kernels.png")
    assert [list(colors) for colors in legends] == [["ours"]]
