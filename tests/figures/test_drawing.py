"""Content of the figures of evaluations and of patches."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from cpc_ext.figures import AccuracyLine, label_efficiency, nearest_patches


def line(mode, group, last):
    labels = np.array([1.0, 10.0])
    return AccuracyLine(f"run{group}: {mode}", mode, group, labels, np.array([0.2, last]), np.array([0.01, 0.02]))


def test_ways_of_learning_have_panels_of_their_own():
    lines = [
        line("untrained", 0, 0.3),
        line("linear", 0, 0.4),
        line("linear", 1, 0.5),
        line("supervised", 1, 0.6),
        line("finetune", 1, 0.7),
    ]
    probes, tuned = label_efficiency(lines, 0.1).axes
    assert [axes.get_title() for axes in (probes, tuned)] == ["linear probe", "fine-tuned"]
    # The legend goes down as the lines do at their ends.
    legend = [text.get_text() for text in probes.get_legend().get_texts()]
    assert legend == ["run1: linear", "run0: linear", "run0: untrained"]
    drawn = {each.get_label(): each for each in (*probes.lines, *tuned.lines)}
    assert [drawn[name].get_linestyle() for name in ("run0: linear", "run0: untrained")] == ["-", "--"]
    assert [drawn[name].get_linestyle() for name in ("run1: finetune", "run1: supervised")] == ["-", "--"]
    # A run has its colour everywhere, two runs have two.
    colors = {name: drawn[name].get_color() for name in drawn if name.startswith("run")}
    assert colors["run0: linear"] == colors["run0: untrained"] != colors["run1: linear"] == colors["run1: finetune"]
    assert list(drawn["run1: finetune"].get_ydata()) == [0.2, 0.7]


def test_one_way_of_learning_has_one_panel():
    (axes,) = label_efficiency([line("knn", 0, 0.9)], 0.1).axes
    low, high = axes.get_ylim()
    assert low == 0
    assert high > 0.92  # All of the line, and above it the legend.
    assert axes.lines[-1].get_ydata()[0] == 0.1


@pytest.mark.parametrize("labelled", [True, False])
def test_frames_are_of_the_same_class(labelled):
    generator = np.random.default_rng(0)
    same = np.array([[True, False, False], [False, True, True]])
    patches = generator.random((2, 3, 1, 4, 4))
    figure = nearest_patches(patches[:, 0], patches, generator.random((2, 3)), same if labelled else None)
    shown = [axes for axes in figure.axes if axes.get_xlabel()]
    plain = to_hex(figure.axes[0].spines["left"].get_edgecolor())
    framed = [to_hex(axes.spines["left"].get_edgecolor()) != plain for axes in shown]
    assert framed == (same.flatten().tolist() if labelled else [False] * 6)
    # Only where there are labels is there something to explain.
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == (
        ["of an image of the same class"] if labelled else []
    )
    frames = [handle for legend in figure.legends for handle in legend.legend_handles if isinstance(handle, Rectangle)]
    assert len(frames) == labelled
