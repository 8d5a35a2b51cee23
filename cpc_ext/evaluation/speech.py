"""The evaluation of runs on speech by `python -m cpc_ext.evaluate`: what the frames of recordings contain.

Classifiers find phones and speakers from frames of the model, of the same model untrained, and of log-mel spectra,
alone and with their neighbours. The ABX error measures how well the frames separate phones without any training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

import cpc_ext
from cpc_ext import figures
from cpc_ext.data import SAMPLE_RATE, SpeechDataset, WaveformSet
from cpc_ext.data.notice import tell
from cpc_ext.evaluation.encoder_run import SpeechRun
from cpc_ext.evaluation.evaluation_record import Row
from cpc_ext.evaluation.options import EvaluationOptions, parse_measures
from cpc_ext.evaluation.speech_record import SpeechRecord, recordings_digest
from cpc_ext.measures.abx import Condition, abx_error, abx_items
from cpc_ext.measures.frames import Alignment
from cpc_ext.measures.speech_frames import (
    FrameMaker,
    RecordingFrames,
    log_mel_frames,
    phone_probe,
    speaker_probe,
)
from cpc_ext.models.encoders.waveform_encoder import KERNELS
from cpc_ext.tasks.speech_task import SpeechTask, probed_recordings
from cpc_ext.training.atomic_file import write_text
from cpc_ext.training.digests import weights_digest
from cpc_ext.training.errors import TrainingError, writing

__all__ = ["evaluate_speech"]

# Number of frames before and after each one in log-mel spectra with neighbours.
_STACKED = 2
_HIDDEN = 512


class _Frames(NamedTuple):
    """Frames to measure: their name in the record, the function that makes them, and all settings it depends on."""

    name: str
    make: FrameMaker
    settings: dict[str, Any]


def evaluate_speech(command: EvaluationOptions, runs: Sequence[SpeechRun]) -> None:
    """Evaluate runs: print tables, and write evaluation/speech.json and figures in each run's folder.

    Raises:
        TrainingError: recordings without any labels for the measures, or a folder that cannot be written to.
    """
    measures = parse_measures(command.measures)
    judges = []
    for run in runs:
        judge = _Judge(command, run, measures)
        if command.per_module:
            judges.append(judge)
            judge.by_depth()
        else:
            judge.table()
    if command.per_module:
        out = command.out or command.runs[0] / "evaluation" / "accuracy_by_depth.png"
        _save_depths(out, judges)


class _Judge:
    """The evaluation of one run on its recordings."""

    def __init__(self, command: EvaluationOptions, run: SpeechRun, measures: list[str]) -> None:
        self.run = run
        self._dataset: SpeechDataset = run.dataset()
        self._measures = measures
        self._alignment: Alignment = command.alignment
        self._layer = command.layer
        test = self._dataset.test
        if test is None:
            raise TrainingError(f"{run.dir.path}: --dataset {self._dataset.name} has no recordings to test with")
        self._sets: list[tuple[WaveformSet, np.ndarray]] = [
            (each, probed_recordings(each, seconds))
            for each, seconds in ((self._dataset.train, 60 * command.minutes), (test, 30 * command.minutes))
        ]
        self._leave_out_unlabelled()
        self._require_speakers(command.minutes)
        self.task: SpeechTask = run.trained(self._dataset)
        layers = self.task.layers(self.task.model)
        self.layers = [layer.name for layer in layers]
        if command.layer is not None and command.layer not in self.layers:
            raise TrainingError(f"--layer: {run.dir.path} has {', '.join(self.layers)}, got {command.layer!r}")
        measured = layers if command.per_module else [layers[self.layers.index(command.layer or self.layers[-1])]]
        dense = [layer.name for layer in measured if layer.convolutions < len(KERNELS)]
        if dense and command.alignment != "centers":
            raise TrainingError(
                f"--alignment {command.alignment} counts frames of 10 ms, but {', '.join(dense)} of {run.dir.path} "
                f"{'has' if len(dense) == 1 else 'have'} more: take --alignment centers"
            )
        self.depths: dict[str, dict[str, Any]] = {}
        self._untrained: SpeechTask = run.untrained(self._dataset, seed=run.config.compute.seed)
        self._weights = weights_digest(self.task.model)
        model = run.config.model_dump(mode="json", exclude={"data", "optimization", "compute", "output", "probe"})
        self._model = hashlib.sha256(repr(model).encode()).hexdigest()[:32]
        with writing(run.dir.path):
            self._folder.mkdir(exist_ok=True)
        digests = [recordings_digest(self._dataset, each, chosen) for each, chosen in self._sets]
        self._record = SpeechRecord(
            self._folder / "measured.json",
            {
                "run": str(run.dir.path),
                "model": run.config.model,
                "dataset": self._dataset.name,
                "weights": self._weights,
                "recordings": dict(zip(("train", "test"), digests, strict=True)),
            },
        )

    def table(self) -> None:
        """Measure the model and what it is compared with; print, write and draw the results."""
        layer = self._layer or self.layers[-1]
        rows: dict[str, dict[str, float]] = {}
        for name, frames in (*self._of_models(layer), *self._spectra().items()):
            found = self._measured(frames, self._measures, name)
            rows[name] = {column: value for row in found.values() for column, value in row["found"].items()}
            if name == "trained":
                self._draw_confusions(found)
        rows["commonest"] = self._commonest()
        self._write({"rows": rows})
        columns = [name for name in rows["trained"] if any(name in row for row in rows.values())]
        print(f"{self.run.dir.path}: {self.run.config.model} on {self._dataset.name}, {self._described()}")
        width = max(map(len, rows))
        print(" " * width + "".join(f"  {name:>13}" for name in columns))
        for name, row in rows.items():
            cells = (f"{row[column]:>13.1%}" if column in row else f"{'-':>13}" for column in columns)
            print(f"{name:<{width}}  " + "  ".join(cells))
        print(f"results and figures are in {self._folder}{self._record.told()}")

    def by_depth(self) -> None:
        """Measure phones and speakers after each layer, trained and untrained; print and write the results."""
        probed = [name for name in self._measures if name in ("phones", "speakers")]
        for layer in self.layers:
            for state, frames in self._of_models(layer):
                for measure, row in self._measured(frames, probed, f"{layer}, {state}").items():
                    self.depths.setdefault(measure, {}).setdefault(state, []).append(row["found"][measure])
        spectra = self._measured(self._spectra()["log-mel"], probed, "log-mel")
        for measure, found in self.depths.items():
            found["log-mel"] = spectra[measure]["found"][measure]
            found["commonest"] = self._commonest()[measure]
        self._write({"layers": self.layers, "by_depth": self.depths}, "by_depth.json")
        print(f"{self.run.dir.path}: {', '.join(self.layers)}{self._record.told()}")
        for measure, found in self.depths.items():
            for state in ("trained", "untrained"):
                print(f"  {measure:<9} {state:<10} " + "  ".join(f"{value:6.1%}" for value in found[state]))

    def _of_models(self, layer: str) -> list[tuple[str, _Frames]]:
        """Return the frames of a layer, of the trained model and of the untrained one."""
        common = {"layer": layer, "model": self._model, "precision": self.run.config.compute.precision}
        return [
            (
                "trained",
                _Frames(
                    f"trained, {layer}", self.task.frames(self.task.model, layer), {"weights": self._weights} | common
                ),
            ),
            (
                "untrained",
                _Frames(
                    f"untrained, {layer}",
                    self._untrained.frames(self._untrained.model, layer),
                    {"weights": None, "initial_weights": weights_digest(self._untrained.model)} | common,
                ),
            ),
        ]

    def _spectra(self) -> dict[str, _Frames]:
        return {
            name: _Frames(name, log_mel_frames(context), {"weights": None})
            for name, context in (("log-mel", 0), (f"log-mel, {2 * _STACKED + 1} frames", _STACKED))
        }

    def _measured(self, frames: _Frames, measures: Sequence[str], name: str) -> dict[str, Row]:
        """Return rows of the record by measure; those that are missing are measured and added."""
        settings = {"cpc_ext": cpc_ext.__version__, "alignment": self._alignment, **frames.settings}
        rows: dict[str, Row] = {}
        both: list[RecordingFrames] = []
        for measure in measures:
            row = self._record.find(frames.name, measure, settings)
            if row is None:
                both = both or self._both(frames.make, name)
                row = {"frames": frames.name, "measure": measure, **self._told(measure, both), "settings": settings}
                self._record.add(row)
            if row["left_out"]:
                tell(self.run.dir.path, row["left_out"])
            rows[measure] = row
        return rows

    def _told(self, measure: str, both: list[RecordingFrames]) -> Row:
        """Return the values of a measure by column of the table, what is left out, and the confusion matrix."""
        row: Row = {"found": {}, "left_out": [], "confusion": []}
        if measure == "abx":
            row["found"], row["left_out"] = self._abx(both[1])
        elif measure.startswith("speakers"):
            how: Any = "last" if measure == "speakers-last" else "mean"
            row["found"][measure] = speaker_probe(*both, speakers=len(self._dataset.speakers), how=how)
        else:
            hidden = _HIDDEN if measure == "phones-hidden" else 0
            classes = len(self._dataset.phone_names)
            result = phone_probe(*both, classes=classes, alignment=self._alignment, hidden=hidden)
            row["found"][measure], row["confusion"] = result.accuracy, result.confusion.tolist()
        return row

    def _draw_confusions(self, rows: dict[str, Row]) -> None:
        for measure, row in rows.items():
            if row["confusion"]:
                title = f"{measure}: {row['found'][measure]:.1%}"
                drawn = figures.confusion(np.array(row["confusion"]), self._dataset.phone_names, title)
                _save(self._folder / f"confusion_{measure}.png", drawn)

    def _abx(self, test: RecordingFrames) -> tuple[dict[str, float], list[str]]:
        """Return ABX errors of the frames that have a phone, and which conditions are left out and why."""
        features, labels, lengths = test.aligned(self._alignment)
        assert test.speakers is not None  # It was checked.
        names = [name.casefold() for name in self._dataset.phone_names]
        silence = names.index("sil") if "sil" in names else 0
        items = abx_items(list(labels.split(lengths)), test.speakers.tolist(), silence=silence)
        found, left_out = {}, []
        conditions: tuple[Condition, ...] = get_args(Condition)
        for condition in conditions:
            # It takes minutes to get here, so a failure must not discard the other results.
            try:
                found[f"abx {condition}"] = abx_error(features, items, speaker=condition).error
            except ValueError as error:
                left_out.append(f"abx {condition} speakers is left out: {str(error).removeprefix('items: ')}")
        return found, left_out

    def _commonest(self) -> dict[str, float]:
        """Return the accuracies of always naming the commonest class."""
        found = {}
        (train, train_chosen), (test, test_chosen) = self._sets
        for measure in self._measures:
            if measure == "abx":
                continue
            if measure.startswith("speakers"):
                named, asked = train.known_speakers[train_chosen], test.known_speakers[test_chosen]
            else:
                named = np.concatenate([train.phones_of(int(index)) for index in train_chosen])
                asked = np.concatenate([test.phones_of(int(index)) for index in test_chosen])
            found[measure] = float((asked == np.bincount(named).argmax()).mean())
        return found

    def _both(self, make: FrameMaker, name: str) -> list[RecordingFrames]:
        def progress(indices: list[int]) -> Iterable[int]:
            return tqdm(indices, desc=f"frames ({name})", unit="recording", dynamic_ncols=True, leave=False)

        return [RecordingFrames.of(each, make, chosen, progress=progress) for each, chosen in self._sets]

    def _leave_out_unlabelled(self) -> None:
        """Drop the measures that there are no labels for, with a notice; TrainingError if none is left."""
        missing = tuple(
            label for label in ("phones", "speakers") if any(getattr(each, label) is None for each, _ in self._sets)
        )
        left_out = [name for name in self._measures if missing and name.startswith((*missing, "abx"))]
        why = f"the recordings of --dataset {self._dataset.name} have no {' and no '.join(missing)}"
        if len(left_out) == len(self._measures):
            raise TrainingError(f"--measures {','.join(self._measures)}: {why}")
        if left_out:
            tell(self.run.dir.path, [f"{why}: {', '.join(left_out)} {'is' if len(left_out) == 1 else 'are'} left out"])
        self._measures = [name for name in self._measures if name not in left_out]

    def _require_speakers(self, minutes: float) -> None:
        train, chosen = self._sets[0]
        asked = [name for name in self._measures if name.startswith("speakers")]
        if asked and len(self._dataset.speakers) > 1 and len(np.unique(train.known_speakers[chosen])) < 2:
            raise TrainingError(
                f"--minutes {minutes:g}: what there is to learn from is of one speaker, so nothing is to be told by "
                f"{', '.join(asked)}: take more, or other --measures"
            )

    def _described(self) -> str:
        minutes = [sum(len(each.recording(int(i))) for i in chosen) / SAMPLE_RATE / 60 for each, chosen in self._sets]
        return f"{minutes[0]:.1f} minutes to learn from, {minutes[1]:.1f} to test on"

    @property
    def _folder(self) -> Path:
        return self.run.dir.path / "evaluation"

    def _write(self, results: dict[str, Any], name: str = "speech.json") -> None:
        header = {
            "cpc_ext": cpc_ext.__version__,
            "run": str(self.run.dir.path),
            "model": self.run.config.model,
            "dataset": self._dataset.name,
            "step": self.run.state.get("step"),
            "layer": self._layer or self.layers[-1],
            "alignment": self._alignment,
            "train_recordings": len(self._sets[0][1]),
            "test_recordings": len(self._sets[1][1]),
        }
        text = json.dumps({**header, **results}, indent=2) + "\n"
        _guarded(self._folder / name, lambda path: write_text(path, text))


def _save_depths(out: Path, judges: Sequence[_Judge]) -> None:
    first = judges[0]
    panels = [
        figures.DepthPanel(
            title=measure,
            accuracies={
                judge.run.dir.path.name: judge.depths[measure]["trained"] for judge in judges if measure in judge.depths
            },
            untrained=found["untrained"],
            levels={name: found[name] for name in ("log-mel", "commonest")},
        )
        for measure, found in first.depths.items()
    ]
    _save(out, figures.speech_by_depth(panels))
    print(f"accuracy after each module; drawn in {out}")


def _save(path: Path, figure: Any) -> None:
    _guarded(path, lambda at: figures.save(at, figure))


def _guarded(path: Path, write: Callable[[Path], None]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
