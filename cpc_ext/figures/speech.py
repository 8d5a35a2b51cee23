"""Figures of speech: what a model's frames show of an utterance, and what is readable after each of its modules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from cpc_ext.figures.modules import draw_depths
from cpc_ext.figures.palette import BLUE

__all__ = ["DepthPanel", "speech_by_depth", "spoken_frames"]

# Inches of a second of speech, at which the names of its phones do not lie on one another.
_INCHES_A_SECOND = 6.0
# Bands of the spectrum quieter than this part of the frames are black.
_DARK, _BRIGHT = 0.05, 0.995


@dataclass(frozen=True)
class DepthPanel:
    """What was told from a model's modules, such as phones.

    title: what that is. accuracies: fractions by the name of the run, one a module. untrained: of an encoder with
    initial weights. levels: by name, what does not depend on the depth, such as log-mel and chance.
    """

    title: str
    accuracies: Mapping[str, Sequence[float]]
    untrained: Sequence[float]
    levels: Mapping[str, float]


def speech_by_depth(panels: Sequence[DepthPanel]) -> Figure:
    """Accuracy of linear probes after each module, side by side for each thing to tell."""
    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_depths(axes, panel.accuracies, panel.untrained, panel.levels)
        axes.set_title(panel.title)
        axes.set_ylim(0, 1.02)
        # Below, as lines may run anywhere.
        axes.legend(frameon=False, title="after all modules", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def spoken_frames(
    spectrum: np.ndarray,
    labels: np.ndarray,
    frames: np.ndarray,
    *,
    names: Sequence[str],
    label_centers: np.ndarray,
    frame_centers: np.ndarray,
    title: str,
) -> Figure:
    """An utterance: its spectrum, the phones in it, and the model's frames, one below the other.

    Of the frames, their first three principal components in the utterance are the red, green and blue of a band of
    colours, so that frames alike look alike; the line below tells how far each is from the one before.

    Args:
        spectrum: logarithms of energies, [L, bands], at least two frames.
        labels: the class of each frame of the spectrum, [L].
        frames: the model's, [F, D], at least two.
        names: of the classes.
        label_centers, frame_centers: where frames lie in the utterance, in seconds, [L] and [F], evenly spaced.
        title: what the figure is of.
    """
    begin, end = _edges(label_centers)
    figure = Figure(figsize=(max(6.0, 1.2 + _INCHES_A_SECOND * (end - begin)), 5.6), layout="constrained")
    above, named, colored, line = figure.subplots(4, 1, sharex=True, height_ratios=(4, 0.6, 0.8, 1.6))
    low, high = np.quantile(spectrum, [_DARK, _BRIGHT])
    above.imshow(
        spectrum.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low,
        vmax=max(high, low + 1e-6),
        extent=(begin, end, 0, spectrum.shape[1]),
        interpolation="nearest",
    )
    above.set_ylabel("mel band")
    above.set_title(title, fontsize=11)
    _name_phones(named, labels, names, label_centers)
    first, last = _edges(frame_centers)
    colored.imshow(_colors(frames)[None], aspect="auto", extent=(first, last, 0, 1), interpolation="nearest")
    colored.set_yticks([])
    colored.set_ylabel("frames", rotation=0, ha="right", va="center")
    line.plot(frame_centers[1:], _turns(frames), color=BLUE, linewidth=1.2)
    line.set_ylabel("angle to the\nframe before (°)")
    line.set_ylim(bottom=0)
    line.grid(alpha=0.25)
    line.spines[["top", "right"]].set_visible(False)
    line.set_xlabel("seconds")
    line.set_xlim(begin, end)
    line.xaxis.set_major_locator(MultipleLocator(0.1 if end - begin < 2.5 else 0.5))
    return figure


def _edges(centers: np.ndarray) -> tuple[float, float]:
    """Where evenly spaced frames of these centres begin and end."""
    half = (centers[-1] - centers[0]) / (len(centers) - 1) / 2
    return float(centers[0] - half), float(centers[-1] + half)


def _name_phones(axes: Axes, labels: np.ndarray, names: Sequence[str], centers: np.ndarray) -> None:
    """Intervals of the same label, named, in two shades by turns."""
    begin, end = _edges(centers)
    hop = (end - begin) / len(labels)
    changes = np.flatnonzero(np.diff(labels)) + 1
    borders = [0, *changes.tolist(), len(labels)]
    for number, (first, last) in enumerate(itertools.pairwise(borders)):
        left, right = begin + first * hop, begin + last * hop
        axes.axvspan(left, right, color=("#e4e9f0", "#c9d3e0")[number % 2], linewidth=0)
        axes.text((left + right) / 2, 0.5, names[labels[first]], ha="center", va="center", fontsize=8, clip_on=True)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel("phones", rotation=0, ha="right", va="center")


def _colors(frames: np.ndarray) -> np.ndarray:
    """Red, green and blue in 0..1 of frames [F, D] → [F, 3], each component from its lowest to its highest values."""
    centred = frames.astype(np.float64) - frames.mean(0)
    # The signs of components are anybody's choice: that of their largest value, so that they are always the same.
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    components *= np.sign(components[np.arange(len(components)), abs(components).argmax(1)])[:, None]
    values = np.zeros((len(frames), 3))
    values[:, : len(components)] = centred @ components.T
    low, high = np.quantile(values, [0.02, 0.98], axis=0)
    colors: np.ndarray = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colors


def _turns(frames: np.ndarray) -> np.ndarray:
    """Angles in degrees between frames [F, D] and the ones before, [F - 1]."""
    lengths = np.linalg.norm(frames, axis=1, keepdims=True)
    directions = frames / np.maximum(lengths, 1e-12)
    cosines = (directions[1:] * directions[:-1]).sum(1)
    angles: np.ndarray = np.degrees(np.arccos(cosines.clip(-1, 1)))
    return angles
