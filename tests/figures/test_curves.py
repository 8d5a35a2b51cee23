"""Curves of runs: drawing of few and of many points, and reference lines."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cpc_ext.figures import ProbeCurve, curves, curves_by_module, likelihood_curves

GUESS = {"loss": 2.0, "accuracy": 0.1}
WORDS = {"loss": "entropy", "accuracy": "share"}


def records(steps):
    names = ("loss", "accuracy", *(f"{name}_module_{module}" for name in ("loss", "accuracy") for module in range(2)))
    return [{"step": step, **dict.fromkeys(names, 1 / (1 + step) + 0.1 * (step % 2))} for step in steps]


def lines_of(axes):
    """Curves, without the lines of levels, by their labels: x, y and marker."""
    return {
        line.get_label(): (line.get_xdata(), line.get_ydata(), line.get_marker())
        for line in axes.lines
        if line.get_label() not in ("guessing", "commonest class", "static histogram")
    }


def drawn(figure):
    """The figure laid out, as saving does it."""
    FigureCanvasAgg(figure).print_png(io.BytesIO())
    return figure


@pytest.mark.parametrize("steps", [[3], [20, 40, 50], range(1, 18)])
def test_of_few_points_all_are_marked_and_none_is_cut(steps):
    steps = list(steps)
    figure = drawn(curves(records(steps), GUESS, **WORDS))
    for axes in figure.axes:
        # No mean of points that are as many as it: nothing would be smooth.
        ((name, (x, y, marker)),) = lines_of(axes).items()
        assert (name, list(x), marker) == ("logged", steps, "o")
        assert len(y) == len(steps)
        left, right = axes.get_xlim()
        assert left < 0
        assert right > steps[-1]
        low, high = axes.get_ylim()
        assert low < min(y) <= max(y) < high
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_of_many_points_there_is_a_mean():
    found = records(range(20, 2001, 20))
    loss, accuracy = drawn(curves(found, GUESS, **WORDS)).axes
    lines = lines_of(loss)
    assert set(lines) == {"logged", "smoothed"}
    _, values, marker = lines["logged"]
    assert marker in ("", "None")
    means = [np.mean(values[max(0, end - 5) : end]) for end in range(1, 101)]  # Over a twentieth.
    assert lines["smoothed"][1] == pytest.approx(means)
    assert loss.get_title() == f"loss: {means[-1]:.3f}"
    assert accuracy.get_ylim()[0] == 0


@pytest.mark.parametrize("chance", [None, 0.25])
@pytest.mark.parametrize("modules", [None, [1], [0, 1]])
def test_probes_are_beside_the_rest(modules, chance):
    probe = ProbeCurve([0, 30, 60], [0.2, 0.3, 0.5], chance)
    found = records([20, 40])
    make = (lambda **more: curves(found, GUESS, **more)) if modules is None else None
    make = make or (lambda **more: curves_by_module(found, modules, GUESS, **more))
    assert len(make(**WORDS).axes) == 2
    figure = drawn(make(**WORDS, probe=probe))
    loss, accuracy, last = figure.axes
    assert [axes.get_ylabel() for axes in (loss, accuracy)] == ["entropy (nats)", "share"]
    ((_, (x, y, marker)),) = lines_of(last).items()
    assert (list(x), list(y), marker) == ([0, 30, 60], [0.2, 0.3, 0.5], "o")
    assert len(last.lines) == (1 if chance is None else 2)
    assert "50.0%" in last.get_title()
    # All panels go on to the last step that anything is known of.
    assert loss.get_xlim() == last.get_xlim()
    (legend,) = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    curve_names = {"logged"} if modules is None else {f"module {module}" for module in modules}
    assert names == {*curve_names, "guessing", "nearest neighbours", *([] if chance is None else ["commonest class"])}


@pytest.mark.parametrize("differ", [False, True])
def test_each_module_has_its_own_guessing(differ):
    guesses = [{"loss": 2.0, "accuracy": 0.1}, {"loss": 3.0, "accuracy": 0.05} if differ else GUESS]
    figure = drawn(curves_by_module(records([20, 40]), [0, 1], guesses, **WORDS))
    for name, axes in zip(("loss", "accuracy"), figure.axes, strict=True):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        levels = [guess[name] for guess in guesses][: 2 if differ else 1]
        assert [line.get_ydata()[0] for line in dashed] == levels
        curve_colors = [line.get_color() for line in axes.lines if line.get_label().startswith("module")]
        assert ([line.get_color() for line in dashed] == curve_colors) == differ
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()].count("guessing") == 1


def test_a_legend_lies_on_no_curve():
    figure = drawn(curves(records([20, 40, 50]), GUESS, **WORDS))
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_likelihoods_of_which_one_is_known():
    figure = drawn(likelihood_curves([{"step": 3, "heldout_bits_per_dim": 4.5}], 6.0))
    (axes,) = figure.axes
    ((name, (x, y, marker)),) = lines_of(axes).items()
    assert (name, list(x), list(y), marker) == ("held-out (a part)", [3], [4.5], "o")
    both = [{"step": 2, "bits_per_dim": 5.0}, {"step": 4, "heldout_bits_per_dim": 4.5}]
    (axes,) = drawn(likelihood_curves(both, 6.0)).axes
    assert axes.get_title() == "bits per dimension: training 5.000, held-out (a part) 4.500"
    assert axes.get_xlim()[1] > 4
