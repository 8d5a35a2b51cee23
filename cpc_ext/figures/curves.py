"""Curves of a run over its steps: loss and accuracy of a model or of its modules, bits per dimension, and probes.

A short run has few points, which are marked; a long one has thousands, which are drawn with a running mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cpc_ext.figures.palette import BLUE, GRAY, GREEN, LINES

__all__ = ["ProbeCurve", "curves", "curves_by_module", "likelihood_curves"]

# The running mean looks back over this share of the run.
_SMOOTHING = 0.05
# Up to this number of points each one is marked, as a line through one or two may be invisible, and would not show how
# few there are.
_MARKED = 20


@dataclass(frozen=True)
class ProbeCurve:
    """Results of a probe during training.

    steps, accuracy: step and accuracy of each measurement, as fractions. chance: accuracy of always naming the
    commonest class; None if unknown.
    """

    steps: Sequence[float]
    accuracy: Sequence[float]
    chance: float | None


def curves(
    metrics: Sequence[dict[str, float]],
    guessing: Mapping[str, float],
    *,
    loss: str,
    accuracy: str,
    probe: ProbeCurve | None = None,
) -> Figure:
    """Draw loss and accuracy over the run, and beside them the results of the probe.

    metrics: logged steps with "step", "loss" and "accuracy", at least one. guessing: both for a model that guesses,
    drawn as lines. loss, accuracy: labels of the axes.
    """
    steps = np.array([record["step"] for record in metrics])
    figure, panels = _panels(steps[-1], loss, accuracy, probe)
    for name, axes in panels.items():
        values = np.array([record[name] for record in metrics])
        last = _draw(axes, steps, values, BLUE, "", faint="logged", smooth="smoothed")
        axes.axhline(guessing[name], color=GRAY, linestyle="--", linewidth=1, label="guessing")
        axes.set_title(f"{name}: {last:.3f}" if name == "loss" else f"{name}: {last:.1%}")
    _finish(figure)
    return figure


def curves_by_module(
    metrics: Sequence[dict[str, float]],
    modules: Sequence[int],
    guessing: Mapping[str, float] | Sequence[Mapping[str, float]],
    *,
    loss: str,
    accuracy: str,
    probe: ProbeCurve | None = None,
) -> Figure:
    """Draw loss and accuracy of every module over the run, and beside them the results of the probe.

    metrics: logged steps with "step", and "loss" and "accuracy" of one module or "loss_module_0" and so on of several,
    at least one. modules: numbers of the trained modules. guessing: both for a model that guesses, of all modules or of
    each, drawn as lines, in the modules' colours if they differ. loss, accuracy: labels of the axes.
    """
    steps = np.array([record["step"] for record in metrics])
    figure, panels = _panels(steps[-1], loss, accuracy, probe)
    for name, axes in panels.items():
        for place, module in enumerate(modules):
            key = name if len(modules) == 1 else f"{name}_module_{module}"
            values = np.array([record[key] for record in metrics])
            _draw(axes, steps, values, LINES[place % len(LINES)], f"module {module}")
        levels = [each[name] for each in ([guessing] if isinstance(guessing, Mapping) else guessing)]
        if len(set(levels)) == 1:
            axes.axhline(levels[0], color=GRAY, linestyle="--", linewidth=1, label="guessing")
            continue
        # The line in the legend stands for all modules.
        axes.plot([], [], color=GRAY, linestyle="--", linewidth=1, label="guessing")
        for place, level in enumerate(levels):
            axes.axhline(level, color=LINES[place % len(LINES)], linestyle="--", linewidth=1)
    _finish(figure)
    return figure


def likelihood_curves(metrics: Sequence[dict[str, float]], static_histogram: float) -> Figure:
    """Draw bits per dimension over the run.

    metrics: logged steps with "step" and "bits_per_dim", and observed ones with "step" and "heldout_bits_per_dim".
    static_histogram: bits per dimension of the best static per-pixel histogram model, drawn as a line.
    """
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    axes = figure.subplots()
    told = []
    for name, label, color in (
        ("bits_per_dim", "training", BLUE),
        ("heldout_bits_per_dim", "held-out (a part)", GREEN),
    ):
        records = [record for record in metrics if name in record]
        if not records:
            continue
        steps = np.array([record["step"] for record in records])
        values = np.array([record[name] for record in records])
        # Held-out values are always of the same images, and have no noise to smooth.
        last = _draw(axes, steps, values, color, label, noisy=name == "bits_per_dim")
        told.append(f"{label} {last:.3f}")
    axes.axhline(static_histogram, color=GRAY, linestyle="--", linewidth=1, label="static histogram")
    axes.set_title(f"bits per dimension: {', '.join(told)}", fontsize=11)
    axes.set_ylabel("bits per dimension")
    _over_steps(axes, max(record["step"] for record in metrics))
    _finish(figure)
    return figure


def _panels(last_step: float, loss: str, accuracy: str, probe: ProbeCurve | None) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with axes for "loss" and "accuracy", and with the probe's curve if there is one."""
    count = 2 if probe is None else 3
    figure = Figure(figsize=(5 * count, 4.3), layout="constrained")
    axes = figure.subplots(1, count)
    if probe is not None:
        last_step = max(last_step, *probe.steps)
        _draw(axes[2], np.array(probe.steps), np.array(probe.accuracy), GREEN, "nearest neighbours", noisy=False)
        if probe.chance is not None:
            axes[2].axhline(probe.chance, color=GRAY, linestyle=":", linewidth=1, label="commonest class")
        axes[2].set_ylabel("nearest neighbours' accuracy, held-out")
        axes[2].set_title(f"probe on the way: {probe.accuracy[-1]:.1%}")
    for each in axes:
        _over_steps(each, last_step)
    axes[0].set_ylabel(f"{loss} (nats)")
    axes[1].set_ylabel(accuracy)
    return figure, {"loss": axes[0], "accuracy": axes[1]}


def _draw(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    color: str,
    label: str,
    *,
    noisy: bool = True,
    faint: str = "",
    smooth: str = "",
) -> float:
    """Draw a curve; for noisy values, if there are enough, a running mean with the values themselves faint behind it.

    label: label of the curve; or faint and smooth: labels of the values and of their mean.

    Returns the last value, or mean.
    """
    mean = _smoothed(values) if noisy else values
    marker = "o" if len(values) <= _MARKED else ""
    # Labels that begin with an underscore stay out of legends.
    if np.array_equal(mean, values):
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=5, label=label or faint)
    else:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1, marker=marker, label=faint or "_values")
        axes.plot(steps, mean, color=color, linewidth=2, label=label or smooth)
    return float(mean[-1])


def _over_steps(axes: Axes, last_step: float) -> None:
    """Set the x axis to steps from 0 to the last, with a margin so that no marker is cut off."""
    axes.set_xlabel("step (parameter updates)")
    last = max(last_step, 1)
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.margins(y=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure) -> None:
    """Finish a figure with all curves drawn: fractions begin at zero, and one legend is below all axes."""
    for axes in figure.axes[1:]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    handles = list(named.values())
    figure.legend(handles=handles, labels=list(named), frameon=False, loc="outside lower center", ncols=len(named))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over the last values; over fewer at the start."""
    window = max(1, round(_SMOOTHING * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return values if window == 1 else means
