"""The evaluation of `python -m cpc_ext.evaluate`: how well the encoders of runs do with few labels.

Subsets of the labelled training images are drawn from a seed, a classifier learns from each in one of several ways, and
all test images are classified. Frozen encodings are computed once and kept in the run's folder, as is every result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cpc_ext
from cpc_ext import figures
from cpc_ext.evaluation.encoder_run import EncoderRun, SpeechRun
from cpc_ext.evaluation.encodings_cache import cached_encodings
from cpc_ext.evaluation.evaluation_record import EvaluationRecord, as_table, measured
from cpc_ext.evaluation.finetuning import FineTuning, fine_tune
from cpc_ext.evaluation.options import FINETUNE_LR, EvaluationOptions, parse_modes
from cpc_ext.evaluation.per_module import evaluate_per_module
from cpc_ext.evaluation.speech import evaluate_speech
from cpc_ext.measures.knn import TEMPERATURE, knn_scores
from cpc_ext.measures.label_subsets import LabelBudget, parse_label_budgets
from cpc_ext.measures.probe import encode, fit_linear_classifier
from cpc_ext.tasks.encoder_options import EncoderConfig
from cpc_ext.training.digests import images_digest, weights_digest
from cpc_ext.training.errors import EncodingsNotFiniteError, TrainingError, warn, writing
from cpc_ext.training.precision import check_device
from cpc_ext.training.run_dir import RunDir

__all__ = ["evaluate", "judged"]

# The encoder's share of the run's learning rate in fine-tuning: trained weights should change less than new ones.
_FINETUNE_SHARE = 0.5
# Modes that do not use the weights that the run has trained.
_WITHOUT_TRAINED = ("supervised", "untrained")


def evaluate(command: EvaluationOptions) -> None:
    """Evaluate runs as the options say. TrainingError if that is not possible."""
    try:
        _evaluate(command)
    except EncodingsNotFiniteError as error:
        raise TrainingError(
            f"{', '.join(map(str, command.runs))}: encodings that cannot be measured: {error}"
        ) from None


def _evaluate(command: EvaluationOptions) -> None:
    device = check_device(command.device)
    media = {RunDir(path).medium for path in command.runs}
    if len(media) > 1:
        raise TrainingError("runs on images and runs on speech are not measured alike: give either")
    if media == {"audio"}:
        evaluate_speech(command, [SpeechRun.open(path, device, data_dir=command.data_dir) for path in command.runs])
        return
    if command.per_module:
        runs = [EncoderRun.open(path, device, data_dir=command.data_dir) for path in command.runs]
        out = command.out or command.runs[0] / "evaluation" / "accuracy_by_depth.png"
        evaluate_per_module(runs, out, lambda steps, name: _progress(steps, f"encoding ({name})", "batch"))
        return
    modes = parse_modes(command.mode)
    budgets = parse_label_budgets(command.labels)
    records = {}
    for path in command.runs:
        evaluator = _Evaluator(command, EncoderRun.open(path, device, data_dir=command.data_dir))
        subsets = [evaluator.subsets(budget) for budget in budgets]  # Budgets that are too large fail before any work.
        try:
            for mode in modes:
                for budget, drawn in zip(budgets, subsets, strict=True):
                    evaluator.row(mode, budget, drawn)
        finally:
            evaluator.report()
        records[path] = evaluator.record
    if len(records) > 1:
        out = command.out or command.runs[0] / "evaluation" / "comparison.png"
        _save_figure(out, _compared(records))
        print(f"the runs are compared in {out}")


class _Evaluator:
    """The evaluation of one run: its images, encodings and results.

    Raises TrainingError if its data set has no labels to learn from and to test with.
    """

    def __init__(self, command: EvaluationOptions, run: EncoderRun) -> None:
        self._command = command
        self._run = run
        self._dataset = run.dataset()
        name, train, test = self._dataset.name, self._dataset.train, self._dataset.test
        if train is None or train.labels is None or test is None or test.labels is None:
            raise TrainingError(f"{run.dir.path}: the images of --dataset {name} have no labels to evaluate with")
        self._train, self._test = train, test
        self._train_labels, self._test_labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
        self._classes = len(self._dataset.classes)
        self._task = run.trained(self._dataset)
        if isinstance(run.config, EncoderConfig) and run.config.learns_from_labels:
            used = [mode for mode in parse_modes(command.mode) if mode not in _WITHOUT_TRAINED]
            if used:
                warn(
                    f"{run.dir.path}: the encoder has learned from the labels of all training images; "
                    f"{', '.join(used)} of fewer labels does not tell how few are enough"
                )
        self._folder = run.dir.path / "evaluation"
        with writing(run.dir.path):
            self._folder.mkdir(exist_ok=True)
        self._images = {"train": images_digest(train), "test": images_digest(test)}
        self._weights = weights_digest(self._task.model)
        self._kept: dict[tuple[str, str], Tensor] = {}
        self.record = EvaluationRecord(
            self._folder / "evaluation.json",
            {
                "run": str(run.dir.path),
                "model": run.config.model,
                "dataset": name,
                "step": run.state.get("step"),
                "weights": self._weights,
                "images": self._images,
                "train_images": len(train),
                "test_images": len(test),
                "chance_accuracy": torch.bincount(self._test_labels).max().item() / len(test),
                "classes": list(self._dataset.classes),
            },
        )

    def subsets(self, budget: LabelBudget) -> list[np.ndarray]:
        """Return the draws of a budget as indices of training images; only one draw if it takes all of them."""
        drawn = []
        for draw in range(self._command.repeats):
            subset = budget.subset(
                self._train_labels.numpy(), self._dataset.classes, seed=self._command.seed, draw=draw
            )
            if len(subset) < 2:
                raise TrainingError(f"--labels {budget}: {len(subset)} label is too few to learn from")
            drawn.append(subset)
            if len(subset) == len(self._train):
                break
        return drawn

    def row(self, mode: str, budget: LabelBudget, drawn: list[np.ndarray]) -> None:
        """Measure a mode on the draws of a budget, unless that was done before."""
        settings = self._settings(mode, len(drawn), len(drawn[0]))
        if self.record.find(mode, str(budget), settings) is not None:
            return
        started = time.perf_counter()
        top1, top5 = [], []
        confusion = torch.zeros(self._classes, self._classes, dtype=torch.int64)
        for draw, chosen in enumerate(drawn):
            name = f"{mode}, {budget} of the labels" if budget.share is not None else f"{mode}, {budget} labels a class"
            scores = self._scores(mode, chosen, draw, f"{name}, {draw + 1} of {len(drawn)}")
            one, five, counts = judged(scores, self._test_labels)
            top1.append(one)
            top5.append(five)
            confusion += counts
        self.record.add(
            {
                "mode": mode,
                "labels": str(budget),
                "labels_per_class": round(len(drawn[0]) / self._classes, 2),
                "label_count": len(drawn[0]),
                "repeats": len(drawn),
                **measured("top1", top1),
                **(measured("top5", top5) if self._classes > 5 else {}),
                "seconds": round(time.perf_counter() - started, 2),
                "settings": settings,
                "confusion": confusion.tolist(),
            }
        )

    def report(self) -> None:
        """Print all results of the run and draw its figures."""
        if not self.record.rows:
            return
        print(f"{self._run.dir.path}: {self._run.config.model} on {self._dataset.name}, {len(self._test)} test images")
        print(as_table(self.record.rows))
        chance = self.record.header["chance_accuracy"]
        lines = [figures.AccuracyLine.of(mode, rows, mode) for mode, rows in self.record.lines().items()]
        _save_figure(self._folder / "label_efficiency.png", figures.label_efficiency(lines, chance))
        for mode, rows in self.record.lines().items():
            row = max(rows, key=lambda each: each["label_count"])
            title = f"{mode}, {row['labels_per_class']:g} labels a class: {row['top1_mean']:.1%}"
            figure = figures.confusion(np.array(row["confusion"]), self._dataset.classes, title)
            _save_figure(self._folder / f"confusion_{mode}.png", figure)
        print(f"always the same class: {chance:.1%}; results and figures are in {self._folder}{self.record.told()}")

    def _settings(self, mode: str, repeats: int, images: int) -> dict[str, Any]:
        """Return all that a row's values depend on, besides its mode, labels and images."""
        settings: dict[str, Any] = {
            "cpc_ext": cpc_ext.__version__,
            "weights": None if mode in _WITHOUT_TRAINED else self._weights,
            "seed": self._command.seed,
            "repeats": repeats,
            "precision": self._run.config.compute.precision,
        }
        if mode == "knn":
            settings |= {"neighbours": min(self._command.neighbours, images), "temperature": TEMPERATURE}
        if mode in ("finetune", "supervised"):
            recipe = self._recipe(mode)
            settings |= {**asdict(recipe), "steps": recipe.steps(images)}
        return settings

    def _recipe(self, mode: str) -> FineTuning:
        optimization = self._run.config.optimization
        peak = optimization.lr if optimization.optimizer == "adam" else FINETUNE_LR
        return FineTuning(
            epochs=self._command.finetune_epochs,
            min_steps=self._command.finetune_steps,
            encoder_lr=peak * (_FINETUNE_SHARE if mode == "finetune" else 1.0),
            head_lr=peak,
        )

    def _scores(self, mode: str, chosen: np.ndarray, draw: int, name: str) -> Tensor:
        """Return class scores, [N, classes], of all test images after learning from the chosen training images."""
        labels = self._train_labels[chosen]
        if mode == "knn":
            return knn_scores(
                self._encodings("trained", "train")[chosen],
                labels,
                self._encodings("trained", "test"),
                classes=self._classes,
                neighbours=self._command.neighbours,
            )
        if mode in ("linear", "untrained"):
            state = "trained" if mode == "linear" else "untrained"
            classifier = fit_linear_classifier(self._encodings(state, "train")[chosen], labels, classes=self._classes)
            return classifier.logits(self._encodings(state, "test"))
        seed = 1000 * self._command.seed + draw
        # Every draw has initial weights of its own, so that the standard deviation includes their effect.
        task = self._task if mode == "finetune" else self._run.untrained(self._dataset, seed=seed)
        return fine_tune(
            task,
            copy.deepcopy(task.model),
            self._train,
            chosen,
            self._test,
            self._recipe(mode),
            classes=self._classes,
            precision=self._run.config.compute.precision,
            seed=seed,
            progress=lambda steps: _progress(steps, name, "step"),
        )

    @property
    def _device(self) -> torch.device:
        return torch.device(self._run.config.compute.device)

    def _encodings(self, state: str, split: str) -> Tensor:
        """Return frozen encodings [N, D] of "train" or "test" by the "trained" or "untrained" encoder."""
        if (state, split) not in self._kept:
            task = self._task
            if state == "untrained":
                task = self._run.untrained(self._dataset, seed=self._run.config.compute.seed)
            images = self._train if split == "train" else self._test
            view = self._run.config.model_dump(
                mode="json", exclude={"data", "optimization", "compute", "output", "probe"}
            )
            origin = {
                "cpc_ext": cpc_ext.__version__,
                "weights": weights_digest(task.model),
                "images": self._images[split],
                "statistics": repr((self._dataset.mean, self._dataset.std)),
                "model": repr(view),
                "precision": self._run.config.compute.precision,
            }
            self._kept[state, split] = cached_encodings(
                self._folder / f"features-{state}-{split}.safetensors",
                origin,
                len(images),
                lambda: encode(
                    images,
                    lambda batch: task.features(task.model, batch),
                    self._device,
                    progress=lambda batches: _progress(batches, f"encoding the {split} images ({state})", "batch"),
                ),
            )
        return self._kept[state, split]


def judged(scores: Tensor, labels: Tensor) -> tuple[float, float, Tensor]:
    """Return top-1 and top-5 accuracy of scores [N, classes], and the confusion matrix.

    Accuracies are fractions of the images; the matrix is int64 [classes, classes], true class by row, predicted one by
    column.
    """
    classes = scores.shape[1]
    ranked = scores.topk(min(5, classes), dim=1).indices
    hits = ranked == labels[:, None]
    counts = torch.bincount(labels * classes + ranked[:, 0], minlength=classes**2).view(classes, classes)
    return hits[:, 0].double().mean().item(), hits.any(1).double().mean().item(), counts


def _progress(steps: range, name: str, unit: str) -> Iterator[int]:
    return iter(tqdm(steps, desc=name, unit=unit, dynamic_ncols=True, leave=False))


def _compared(records: dict[Path, EvaluationRecord]) -> Any:
    """Draw the label efficiency of all runs in one figure."""
    lines = []
    for number, (path, record) in enumerate(records.items()):
        for mode, rows in record.lines().items():
            lines.append(figures.AccuracyLine.of(f"{path.name}: {mode}", rows, mode, group=number))
    return figures.label_efficiency(lines, max(record.header["chance_accuracy"] for record in records.values()))


def _save_figure(path: Path, figure: Any) -> None:
    with writing(path):
        figures.save(path, figure)
