"""The results of evaluating a run, as evaluation.json: a row for every mode and number of labels.

The file grows by a row at a time and is complete after each, so that finished results are kept whatever happens later.
Rows of other weights or images than the current ones are left out. Runs on speech have a file of the same kind.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from cpc_ext.training.atomic_file import write_text
from cpc_ext.training.errors import TrainingError, writing

__all__ = ["EvaluationRecord", "Row", "as_table", "measured"]

Row = dict[str, Any]

# Entries of every row, with their types. Measured values are further entries with names of their own.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "mode": str,
    "labels": str,
    "labels_per_class": (int, float),
    "label_count": int,
    "repeats": int,
    "top1_mean": float,
    "top1_std": float,
    "seconds": (int, float),
    "settings": dict,
    "confusion": list,
}
# How long to wait for another process to add its row, which takes milliseconds.
_PATIENCE_SECONDS = 60


class EvaluationRecord:
    """evaluation.json at ``path``, with the rows that are still valid.

    header: what was evaluated; its "weights" and "images" decide whether a row that is already there is still valid.

    Attributes:
        reused: number of rows that were found, and so need not be measured again.
    """

    # The two entries that identify a row, all entries of a row, and those that rows are sorted by.
    names: ClassVar[tuple[str, str]] = ("mode", "labels")
    entries: ClassVar[dict[str, type | tuple[type, ...]]] = _ENTRIES
    order: ClassVar[tuple[str, ...]] = ("mode", "labels_per_class", "labels")
    # The header's name of the digests of the examples.
    examples: ClassVar[str] = "images"

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=_PATIENCE_SECONDS)
        self.header = header
        self.rows: list[Row] = []
        self.reused = 0
        self._read()

    def find(self, mode: str, labels: str, settings: dict[str, Any]) -> Row | None:
        """Return the row that was measured with these settings, or None."""
        found = (row for row in self.rows if (*self._named(row), row["settings"]) == (mode, labels, settings))
        row = next(found, None)
        self.reused += row is not None
        return row

    def add(self, row: Row) -> None:
        """Add a row, which replaces one of the same mode and labels, and write the file.

        row: all of :attr:`entries`, and the measured values.

        Raises TrainingError if the file cannot be written.
        """
        with writing(self._path):
            try:
                with self._lock:
                    self._add(row)
            except Timeout:
                raise TrainingError(f"cannot write {self._path}: another process keeps it locked") from None

    def _add(self, row: Row) -> None:
        self._read()  # Another process may have added to it.
        self.rows = [other for other in self.rows if self._named(other) != self._named(row)] + [row]
        self.rows.sort(key=lambda each: [each[name] for name in self.order])
        # Two levels are formatted by hand, so that a row with its confusion matrix is one line.
        head = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in self.header.items()]
        rows = ",\n".join(f"    {json.dumps(each)}" for each in self.rows)
        write_text(self._path, "{\n" + ",\n".join([*head, f'  "rows": [\n{rows}\n  ]']) + "\n}\n")

    def lines(self) -> dict[str, list[Row]]:
        """Return the rows by mode, those of few labels first."""
        lines: dict[str, list[Row]] = {}
        for row in self.rows:
            lines.setdefault(row["mode"], []).append(row)
        return lines

    def told(self) -> str:
        """Return a note on how many results were measured before, to end a message with; empty if there are none."""
        return f" ({self.reused} of these results were there already)" if self.reused else ""

    def _named(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.names)

    def _read(self) -> None:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            rows = kept["rows"] if kept[self.examples] == self.header[self.examples] else []
            for row in rows:
                if not all(isinstance(row[name], kind) for name, kind in self.entries.items()):
                    raise ValueError
            self.rows = [row for row in rows if row["settings"]["weights"] in (None, self.header["weights"])]
        except FileNotFoundError:
            self.rows = []
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise TrainingError(f"{self._path} is damaged: remove it, and its results are computed again") from None


def measured(name: str, values: list[float]) -> dict[str, Any]:
    """Return mean and standard deviation over subsets, and the values themselves, as entries of a row."""
    return {
        f"{name}_mean": statistics.fmean(values),
        f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0,
        name: values,
    }


def as_table(rows: list[Row]) -> str:
    """Format rows as text, one line each below a heading."""
    top5 = any("top5_mean" in row for row in rows)
    heading = ["mode", "labels", "a class", "subsets", "top-1", *(["top-5"] if top5 else []), "seconds"]
    lines = [heading]
    for row in rows:
        accuracies = [_percent(row, name) for name in ("top1", "top5")[: 1 + top5]]
        lines.append(
            [
                row["mode"],
                row["labels"],
                f"{row['labels_per_class']:g}",
                str(row["repeats"]),
                *accuracies,
                f"{row['seconds']:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([mode.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])] for mode, *numbers in lines)
    return "\n".join("  ".join(line) for line in padded)


def _percent(row: Row, name: str) -> str:
    spread = f" ± {100 * row[f'{name}_std']:.1f}" if row["repeats"] > 1 else ""
    return f"{100 * row[f'{name}_mean']:.1f}{spread} %"
