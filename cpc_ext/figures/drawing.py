"""Figures of runs and evaluations: inputs of a model, nearest patches, samples, confusion and label efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from PIL import Image

from cpc_ext.figures.palette import BLUE, GRAY, GREEN, RED
from cpc_ext.training.atomic_file import atomic_file

__all__ = [
    "AccuracyLine",
    "augmentation_sheet",
    "confusion",
    "label_efficiency",
    "model_inputs",
    "nearest_patches",
    "save",
    "save_images",
]

_PURPLE, _ORANGE = "#7d3c98", "#d68910"
# Panels for ways of learning from labels: title, mode of a trained encoder, and mode of its baseline.
_MODES = (
    ("linear probe", "linear", "untrained"),
    ("nearest neighbours", "knn", None),
    ("fine-tuned", "finetune", "supervised"),
)
# Colours of runs, by number.
_RUN_COLORS = (BLUE, _ORANGE, GREEN, _PURPLE, RED)
# Largest number of classes for which a confusion matrix shows numbers.
_NUMBERED_CLASSES = 20
# Tick labels at numbers of labels that are nearer to each other than this factor would overlap.
_TICK_DISTANCE = 1.15
# Least side in pixels of images in a picture; smaller ones are enlarged by whole factors.
_SHOWN_SIDE = 96


def save(path: Path, figure: Figure) -> None:
    """Write a figure as PNG. OSError where that fails."""
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]  # Matplotlib has no annotations there.


@dataclass(frozen=True)
class AccuracyLine:
    """A line of accuracy over labels per class.

    name: label in the legend. mode: way of learning, which decides the panel. group: number of the run, which decides
    the colour. labels, mean, std: [N], ascending in labels.
    """

    name: str
    mode: str
    group: int
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, name: str, rows: Sequence[dict[str, Any]], mode: str, *, group: int = 0) -> AccuracyLine:
        """Return the line through rows of evaluation.json of one mode."""
        columns = (np.array([row[key] for row in rows]) for key in ("labels_per_class", "top1_mean", "top1_std"))
        return cls(name, mode, group, *columns)


def label_efficiency(lines: Sequence[AccuracyLine], chance: float) -> Figure:
    """Draw top-1 accuracy over the number of labels, with a panel for each way of learning from them.

    Runs differ in colour. Dashed lines are baselines of a trained encoder: the same one untrained, or the same network
    learning from the labels alone. chance: accuracy of always naming the commonest class, drawn as a line.
    """
    drawn = {line.mode for line in lines}
    panels = [(title, {mode, baseline}) for title, mode, baseline in _MODES if {mode, baseline} & drawn]
    baselines = {baseline for _, _, baseline in _MODES}
    figure = Figure(figsize=(1.2 + 3.6 * len(panels), 4.2), layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, modes) in zip(row, panels, strict=True):
        # The legend has the lines in the order in which they end.
        for line in sorted((line for line in lines if line.mode in modes), key=lambda each: -each.mean[-1]):
            color = _RUN_COLORS[line.group % len(_RUN_COLORS)]
            dash = "--" if line.mode in baselines else "-"
            axes.plot(line.labels, line.mean, color=color, linestyle=dash, marker="o", markersize=4, label=line.name)
            low, high = line.mean - line.std, line.mean + line.std
            axes.fill_between(line.labels, low, high, color=color, alpha=0.12, linewidth=0)
        axes.axhline(chance, color=GRAY, linestyle=":", linewidth=1)
        _label_axis(axes, lines)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    # Room for the legends, above all lines.
    top = max(float((line.mean + line.std).max()) for line in lines)
    row[0].set_ylim(0, top + 0.3 * max(top, chance))
    row[0].set_ylabel("top-1 accuracy on the test images")
    row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    row[0].annotate(
        "always the same class",
        (0, chance),
        xytext=(3, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=7,
        color=GRAY,
    )
    figure.supxlabel("labels a class (logarithmic)\nmean and standard deviation over random subsets", fontsize=9)
    return figure


def _label_axis(axes: Axes, lines: Sequence[AccuracyLine]) -> None:
    """Put ticks on a logarithmic axis at the numbers of labels that lines have points for."""
    axes.set_xscale("log")
    places: list[float] = []
    for place in np.unique(np.concatenate([line.labels for line in lines])):
        if not places or place >= _TICK_DISTANCE * places[-1]:
            places.append(place)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def confusion(counts: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, as shares of each true class.

    counts: integers [classes, classes], true class by row, predicted class by column.
    """
    count = len(classes)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 3 + 0.4 * min(count, 30)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), label="share of the true class", shrink=0.8)
    if count <= _NUMBERED_CLASSES:
        for row, column in np.ndindex(count, count):
            # Shares that round to 0 % stay empty, so that the matrix can be read.
            if shares[row, column] >= 0.005:
                color = "white" if shares[row, column] > 0.5 else "black"
                text = f"{100 * shares[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    # The names of a hundred classes would overlap.
    size = 9 if count <= _NUMBERED_CLASSES else max(3, 9 * 30 / count)
    axes.set_xticks(range(count), classes, rotation=90 if count > 5 else 0, fontsize=min(9, size))
    axes.set_yticks(range(count), classes, fontsize=min(9, size))
    axes.set_xlabel("named class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    return figure


def save_images(path: Path, images: np.ndarray, *, columns: int | None = None) -> None:
    """Write images side by side as PNG, small ones enlarged. OSError where that fails.

    images: uint8 [N, C, H, W]. columns: images in a row; by default about as many as rows.
    """
    count, _, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    factor = max(1, -(-_SHOWN_SIDE // max(height, width)))
    gap = max(1, height // 16) * factor
    large = images.repeat(factor, 2).repeat(factor, 3).transpose(0, 2, 3, 1)
    large = np.broadcast_to(large, (*large.shape[:3], 3))
    picture = np.full(
        (rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, 3), 255, dtype=np.uint8
    )
    for number, image in enumerate(large):
        row, column = divmod(number, columns)
        top, left = gap + row * (height * factor + gap), gap + column * (width * factor + gap)
        picture[top : top + height * factor, left : left + width * factor] = image
    with atomic_file(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def model_inputs(images: np.ndarray, patches: np.ndarray, *, crop: int) -> Figure:
    """Draw images, and below each the patches that the model gets.

    images: uint8 [B, C, H, W]. patches: floating [B, rows, cols, C', p, p]. crop: side of the central square that the
    patches were cut from, outlined in the image.
    """
    count, rows, columns, _, size, _ = patches.shape
    figure = Figure(figsize=(3 * count, 6.4), layout="constrained")
    grid = figure.subplots(2, count, squeeze=False)
    low, high = np.quantile(patches, [0.005, 0.995])
    for number, (upper, lower) in enumerate(zip(*grid, strict=True)):
        _show(upper, _as_image(images[number] / 255))
        height, width = images.shape[2:]
        corner = ((width - crop) // 2 - 0.5, (height - crop) // 2 - 0.5)
        upper.add_patch(Rectangle(corner, crop, crop, fill=False, edgecolor=RED, linewidth=2))
        shown = ((patches[number] - low) / max(high - low, 1e-6)).clip(0, 1)
        _show(lower, _as_image(_tiled(shown)))
    grid[0][0].set_ylabel("image and crop")
    grid[1][0].set_ylabel(f"{rows} by {columns} patches of {size} by {size} pixels")
    figure.suptitle("What the model sees")
    return figure


def nearest_patches(
    queries: np.ndarray, neighbours: np.ndarray, similarities: np.ndarray, same_class: np.ndarray | None
) -> Figure:
    """Draw patches beside the patches of other images whose encodings are nearest.

    queries: [Q, C, p, p] in 0..1. neighbours: [Q, K, C, p, p], nearest first. similarities: [Q, K], shown
    below each. same_class: [Q, K], whether a neighbour is framed as one of the same class; None without labels.
    """
    count, nearest = similarities.shape
    # Placed by hand, in inches: laying out this many axes automatically takes seconds.
    side, gap, apart, top, bottom = 1.0, 0.25, 0.2, 0.4, 0.35
    width, height = (nearest + 1) * (side + gap) + gap + apart, count * (side + gap) + top + bottom
    figure = Figure(figsize=(width, height))

    def place(row: int, column: int) -> Axes:
        left = gap + column * (side + gap) + (apart if column else 0)
        return figure.add_axes(
            (left / width, (height - top - (row + 1) * side - row * gap) / height, side / width, side / height)
        )

    for row in range(count):
        axes = place(row, 0)
        _show(axes, _as_image(queries[row]))
        if row == 0:
            axes.set_title("patch", fontsize=10)
        for column in range(nearest):
            axes = place(row, column + 1)
            _show(axes, _as_image(neighbours[row, column]))
            axes.set_xlabel(f"{similarities[row, column]:.2f}", fontsize=8, labelpad=2)
            if same_class is not None and same_class[row, column]:
                for spine in axes.spines.values():
                    spine.set(edgecolor=_ORANGE, linewidth=3)
            if row == column == 0:
                axes.set_title("nearest by learned code, of other images", fontsize=10, loc="left")
    figure.text(0.5, 0.02, "below each: cosine similarity of the centred encodings", ha="center", fontsize=9)
    if same_class is not None:
        frame = Rectangle((0, 0), 1, 1, fill=False, edgecolor=_ORANGE, linewidth=3)
        figure.legend([frame], ["of an image of the same class"], loc="upper right", frameon=False, fontsize=9)
    return figure


def augmentation_sheet(rows: Sequence[tuple[str, np.ndarray, Sequence[str]]], *, blocks: int = 2) -> Figure:
    """Draw the results of transforms of a patch: one row per transform, its patches side by side.

    rows: for each, a title, patches [M, C, p, p] in 0..1 and a caption for each patch. blocks: columns of rows.
    """
    side, gap, below, label, apart, margin = 0.64, 0.06, 0.2, 1.25, 0.25, 0.15
    per_block = -(-len(rows) // blocks)
    most = max(len(patches) for _, patches, _ in rows)
    block_width = label + most * (side + gap) + apart
    width, height = blocks * block_width - apart + 2 * margin, per_block * (side + below) + 2 * margin
    figure = Figure(figsize=(width, height))
    for number, (title, patches, captions) in enumerate(rows):
        block, line = divmod(number, per_block)
        left, top = margin + block * block_width, height - margin - line * (side + below)
        figure.text((left + label - 0.1) / width, (top - side / 2) / height, title, ha="right", va="center", fontsize=9)
        for column, (patch, caption) in enumerate(zip(patches, captions, strict=True)):
            x = left + label + column * (side + gap)
            axes = figure.add_axes((x / width, (top - side) / height, side / width, side / height))
            _show(axes, _as_image(patch))
            axes.set_xlabel(caption, fontsize=6.5, labelpad=1.5)
    return figure


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _as_image(pixels: np.ndarray) -> np.ndarray:
    """Return [C, H, W] in 0..1 in the layout that imshow takes."""
    image: np.ndarray = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    return image


def _tiled(patches: np.ndarray) -> np.ndarray:
    """Tile patches [rows, cols, C, p, p] into one picture [C, H, W] with white gaps between them."""
    rows, columns, channels, size, _ = patches.shape
    gap = max(1, size // 8)
    picture = np.ones((channels, rows * (size + gap) - gap, columns * (size + gap) - gap))
    for row in range(rows):
        for column in range(columns):
            top, left = row * (size + gap), column * (size + gap)
            picture[:, top : top + size, left : left + size] = patches[row, column]
    return picture
