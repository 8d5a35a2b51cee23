"""Figures of encoders in modules: accuracy of a linear probe after each module."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cpc_ext.figures.palette import GRAY, LINES

__all__ = ["accuracy_by_depth", "draw_depths"]

# Markers of the runs' lines.
_MARKERS = "osD^vP"


def accuracy_by_depth(
    accuracies: Mapping[str, Sequence[float]], untrained: Sequence[float], chance: float, dataset: str
) -> Figure:
    """Draw the accuracy of a linear probe after each module, one line per run.

    accuracies: fractions by name of the run, one per module. untrained: those of an encoder with initial weights.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_depths(axes, accuracies, untrained, {"chance": chance})
    axes.set_title(f"What is linearly readable at each depth: {dataset}")
    # Beside the lines, which may run anywhere.
    figure.legend(frameon=False, title="after all modules", loc="outside right upper")
    return figure


def draw_depths(
    axes: Axes, accuracies: Mapping[str, Sequence[float]], untrained: Sequence[float], levels: Mapping[str, float]
) -> None:
    """Draw accuracies over the number of modules below the probe, in axes of a figure.

    accuracies: fractions by name of the run, one per module. untrained: those of an encoder with initial weights.
    levels: accuracies that do not depend on the depth, by name.
    """
    for place, (name, values) in enumerate(accuracies.items()):
        axes.plot(
            np.arange(1, len(values) + 1),
            values,
            color=LINES[place % len(LINES)],
            marker=_MARKERS[place % len(_MARKERS)],
            linewidth=2,
            label=f"{name}: {values[-1]:.1%}",
        )
    axes.plot(
        np.arange(1, len(untrained) + 1),
        untrained,
        color=GRAY,
        marker=".",
        linewidth=1.5,
        label=f"untrained: {untrained[-1]:.1%}",
    )
    for (name, level), style in zip(levels.items(), itertools.cycle(("--", ":", "-."))):
        axes.axhline(level, color=GRAY, linestyle=style, linewidth=1, label=f"{name}: {level:.1%}")
    axes.set_xlabel("modules of the encoder below the probe")
    axes.set_ylabel("linear probe, test accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
