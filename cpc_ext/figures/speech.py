"""Figures of speech: a model's frames of an utterance, and the accuracy of probes after each of its modules."""

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

# Width in inches of a second of speech, at which the names of its phones do not overlap.
_INCHES_A_SECOND = 6.0
# Quantiles of the spectrum's values that are drawn darkest and brightest.
_DARK, _BRIGHT = 0.05, 0.995


@dataclass(frozen=True)
class DepthPanel:
    """Accuracies after a model's modules for one kind of labels, such as phones.

    title: title of the panel. accuracies: fractions by name of the run, one per module. untrained: those of an encoder
    with initial weights. levels: accuracies that do not depend on the depth, by name, such as log-mel and chance.
    """

    title: str
    accuracies: Mapping[str, Sequence[float]]
    untrained: Sequence[float]
    levels: Mapping[str, float]


def speech_by_depth(panels: Sequence[DepthPanel]) -> Figure:
    """Draw the accuracy of linear probes after each module, with one panel per kind of labels."""
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
    """Draw an utterance: its spectrum, its phones, and the model's frames, one below the other.

    The first three principal components of the utterance's frames are the red, green and blue of a band of colours, so
    that similar frames have similar colours. The line below shows the angle of each frame to the one before.

    Args:
        spectrum: logarithms of energies, [L, bands], at least two frames.
        labels: class of each frame of the spectrum, [L].
        frames: frames of the model, [F, D], at least two.
        names: names of the classes.
        label_centers, frame_centers: centres of the spectrum's and the model's frames in seconds, [L] and [F], evenly
            spaced.
        title: title of the figure.
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
    """Return where evenly spaced frames with these centres begin and end."""
    half = (centers[-1] - centers[0]) / (len(centers) - 1) / 2
    return float(centers[0] - half), float(centers[-1] + half)


def _name_phones(axes: Axes, labels: np.ndarray, names: Sequence[str], centers: np.ndarray) -> None:
    """Draw intervals of the same label with their names, in two alternating shades."""
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
    """Return red, green and blue in 0..1 of frames [F, D] → [F, 3], each scaled from its 2 % to its 98 % quantile."""
    centred = frames.astype(np.float64) - frames.mean(0)
    # The signs of components are arbitrary: the largest value of each is made positive, so that they are reproducible.
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    components *= np.sign(components[np.arange(len(components)), abs(components).argmax(1)])[:, None]
    values = np.zeros((len(frames), 3))
    values[:, : len(components)] = centred @ components.T
    low, high = np.quantile(values, [0.02, 0.98], axis=0)
    colors: np.ndarray = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colors


def _turns(frames: np.ndarray) -> np.ndarray:
    """Return the angles in degrees between frames [F, D] and the ones before, [F - 1]."""
    lengths = np.linalg.norm(frames, axis=1, keepdims=True)
    directions = frames / np.maximum(lengths, 1e-12)
    cosines = (directions[1:] * directions[:-1]).sum(1)
    angles: np.ndarray = np.degrees(np.arccos(cosines.clip(-1, 1)))
    return angles
