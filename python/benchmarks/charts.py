"""Charts of result files, as PNG. Without matplotlib, one line says so and nothing is drawn."""

from __future__ import annotations

import importlib.util
import itertools
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_accuracy", "draw_failures", "draw_kernels", "draw_training"]

DPI = 130
# A colour-blind safe palette; further alternatives reuse it from the start.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00")
GRAY = "#606060"
# Alternatives that nearly every op has, with the same colours in all charts.
FIXED = {"eager": GRAY, "ours": COLORS[0], "compiled": COLORS[1]}
# Forward passes are solid and filled, forward and backward passes dashed and hollow.
STYLES = {"forward": ("-", "full"), "forward+backward": ("--", "none")}


def draw_kernels(rows: Sequence[dict[str, Any]], sizes: dict[str, str], machine: dict[str, Any], path: Path) -> None:
    """Draw speed-up over eager and peak extra memory against size, with one file for each op and dtype.

    rows: results; those without a size are not drawn. sizes: label of each op's horizontal axis.
    path: the files' names are its name followed by the op, and by the dtype if an op has several.
    """
    drawn = [row for row in rows if row["size"] is not None]
    for op in dict.fromkeys(row["op"] for row in drawn):
        of_op = [row for row in drawn if row["op"] == op]
        dtypes = list(dict.fromkeys(row["dtype"] for row in of_op))
        for dtype in dtypes:
            name = f"{path.stem}-{op}" + (f"-{dtype}" if len(dtypes) > 1 else "")
            of_dtype = [row for row in of_op if row["dtype"] == dtype]
            title = f"{op}, {machine['device']}, {dtype}"
            _draw_op(of_dtype, sizes[op], title, path.with_name(name + path.suffix))


def _draw_op(rows: Sequence[dict[str, Any]], size: str, title: str, path: Path) -> None:
    figure = _figure(title, path, width=9, height=4)
    if figure is None:
        return
    speed, memory = figure.subplots(1, 2)
    series_of = _series(rows)
    names = dict.fromkeys(name for name, _ in series_of)
    others = [name for name in names if name not in FIXED]
    colors = {name: FIXED[name] if name in FIXED else COLORS[2 + others.index(name) % 3] for name in names}
    for (name, passes), series in series_of.items():
        color = colors[name]
        line, fill = STYLES[passes]
        look = {"color": color, "linestyle": line, "fillstyle": fill, "marker": "o", "markersize": 5}
        points = sorted(series, key=lambda point: point[0])
        x = [point[0] for point in points]
        speed_up = [point[1]["against_eager"] for point in points]
        if name != "eager" and None not in speed_up:
            speed.plot(x, speed_up, **look)
        memory.plot(x, [point[1]["peak_extra_bytes"] / 2**20 for point in points], **look, label=name)
    speed.axhline(1, color=GRAY, linewidth=1)
    _log_axes(speed, memory, ticks=sorted({row["size"] for row in rows}))
    speed.set_ylabel("times as fast as eager (higher is better)")
    memory.set_ylabel("peak extra memory, MiB (lower is better)")
    for axes in (speed, memory):
        axes.set_xlabel(size)
    passes = dict.fromkeys(row["passes"] for row in rows)
    _legend(figure, colors, {name: STYLES[name] for name in passes})
    _save(figure, path)


def _series(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[int, dict[str, Any]]]]:
    """Return (size, figures) of every alternative and pass, except those that write into existing memory."""
    series = defaultdict(list)
    for row in rows:
        for name, figures in row["alternatives"].items():
            if "existing memory" not in name:
                series[name, row["passes"]].append((row["size"], figures))
    return series


def _log_axes(speed, memory, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    for axes in (speed, memory):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # Enough ticks if all ratios are near 1, but not too many over decades.
    low, high = speed.get_ylim()
    speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)))


def _legend(figure, colors: dict[str, str], styles: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    for passes, (line, fill) in styles.items():
        handles.append(Line2D([], [], color="black", linestyle=line, marker="o", fillstyle=fill, label=passes))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9)


def draw_training(document: dict[str, Any], path: Path) -> None:
    """Draw images per second and peak memory as bars, and the stages of a step stacked by pass."""
    figure = _figure(f"a CPC step on {document['machine']['device']}", path, width=11, height=4)
    if figure is None:
        return
    speed, memory, stages = figure.subplots(1, 3, width_ratios=(1, 1, 2.4))
    names = ("plain", "tuned", "ours")
    for axes, values, label, format_ in (
        (speed, [document["images_per_second"][name] for name in names], "images a second", "{:.1f}"),
        (memory, [document["peak_extra_bytes"][name] / 2**20 for name in names], "peak extra memory, MiB", "{:.0f}"),
    ):
        axes.bar_label(axes.bar(names, values, color=(GRAY, GRAY, COLORS[0])), fmt=format_)
        axes.set_ylabel(label)
    left: dict[str, float] = defaultdict(float)
    for color, (stage, passes) in zip(COLORS, document["stages"].items(), strict=True):
        for index, (name, seconds) in enumerate(passes.items()):
            stages.barh(name, seconds * 1e3, left=left[name], color=color, label=stage if index == 0 else None)
            left[name] += seconds * 1e3
    stages.set_xlabel("ms of our step (medians)")
    stages.invert_yaxis()
    stages.legend(frameon=False, ncols=len(document["stages"]), loc="lower center", bbox_to_anchor=(0.5, 1))
    for axes in (speed, memory, stages):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_accuracy(results: Sequence[dict[str, Any]], path: Path, *, machine: str = "one core") -> None:
    """Draw accuracies of nearest neighbours during training, with one panel for each given time.

    Methods without a training time are horizontal lines.

    results: results of ``accuracy.py``, in the order of the legend. A method has a colour, runs with the same "title" a
        style; of several seeds the first is drawn.
    machine: what each run had for itself, for the heading.
    """
    first = {(result["minutes"], result["title"]): result for result in sorted(results, key=lambda x: -x["seed"])}
    results = [result for result in results if first[result["minutes"], result["title"]] is result]
    minutes = sorted({result["minutes"] for result in results if result.get("curve")})
    figure = _figure(f"nearest neighbours of frozen features, {machine}", path, width=5.5 * len(minutes), height=5)
    if figure is None or not minutes:
        return
    titles: dict[str, list[str]] = {}
    for result in results:
        of_method = titles.setdefault(result["method"], [])
        if result["title"] not in of_method:
            of_method.append(result["title"])
    colors = dict(zip(titles, itertools.cycle((*COLORS, "#56b4e9", "#e69f00", GRAY)), strict=False))

    def look(result: dict[str, Any]) -> dict[str, Any]:
        place = titles[result["method"]].index(result["title"])
        style = ("-", ":", "-.", (0, (5, 1)))[place % 4] if result.get("curve") else "--"
        return {"color": colors[result["method"]], "linestyle": style}

    for axes, given in zip(figure.subplots(1, len(minutes), sharey=True, squeeze=False)[0], minutes, strict=True):
        for result in results:
            if result["minutes"] == given and result.get("curve"):
                x, y = zip(*result["curve"], strict=True)
                axes.plot(x, [100 * value for value in y], **look(result), marker="o", markersize=3, linewidth=1.5)
            elif not result["minutes"]:
                axes.axhline(100 * result["knn"], **look(result), linewidth=1)
        axes.set_xlabel("minutes of training")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("images told rightly, %")
    from matplotlib.lines import Line2D

    looks = {result["title"]: look(result) for result in results}
    handles = [
        Line2D([], [], **drawn, label=textwrap.fill(_spaced(title), 44, break_on_hyphens=False))
        for title, drawn in looks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False, fontsize=9)
    _save(figure, path)


def _spaced(title: str) -> str:
    """Return a title without backquotes, with spaces after commas so that lists can wrap."""
    return re.sub(r",(?=\S)", ", ", title.replace("`", ""))


def draw_failures(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw two panels for each failure: the contrastive accuracy, and that of nearest neighbours, during training.

    rows: results of ``failures.py``.
    """
    title = "what goes wrong (red), and the same run without it (blue)"
    figure = _figure(title, path, width=8, height=2.1 * len(rows) + 0.8)
    if figure is None or not rows:
        return
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for axes, row in zip(panels, rows, strict=True):
        for side, color in (("right", COLORS[0]), ("wrong", "#c0392b")):
            for panel, curve in zip(axes, ("found", "neighbours"), strict=True):
                x, y = zip(*row[side][curve], strict=True)
                panel.plot(x, [100 * value for value in y], color=color, linewidth=1.5)
        for panel in axes:
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].set_title(row["title"], fontsize=10, loc="left")
        axes[0].set_ylabel("targets found, %")
        axes[1].set_ylabel("neighbours' class, %")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    _save(figure, path)


def _figure(title: str, path: Path, *, width: float, height: float):
    """Return an empty figure, or print a line and return None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed, so {path} was not drawn")
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 8), height), layout="constrained")
    figure.suptitle(title)
    return figure


def _save(figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with path.open("wb") as file:
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(file)
    print(f"drawn: {path}")
