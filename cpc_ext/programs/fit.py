"""``cpc_ext.fit``: training from Python as `python -m cpc_ext.train` does it, also on data in memory."""

from __future__ import annotations

import difflib
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpc_ext.data.images.given import NAME, given_side, keep_dataset
from cpc_ext.data_sets import DATASETS, folder_of
from cpc_ext.programs import training
from cpc_ext.programs.train_options import Command, defaults_of
from cpc_ext.training.config import (
    LENGTHS,
    OptionError,
    RunConfig,
    Section,
    explain,
    option,
    options_of_other_models,
    validate_config,
)
from cpc_ext.training.presets import preset_entry
from cpc_ext.training.registry import MODELS, model_medium
from cpc_ext.training.stop_request import EndedBySignal, signals_raise

__all__ = ["Fitted", "fit"]


@dataclass(frozen=True)
class Fitted:
    """A complete run. path: its folder. summary: its summary.json, which of several processes only the main one has."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)


def fit(
    model: str | None = None,
    dataset: Any = None,
    *,
    test: Any = None,
    unlabeled: Any = None,
    classes: Sequence[str] | None = None,
    workers: int = 0,
    out_dir: str | Path | None = None,
    resume: bool = False,
    config: str | Path | None = None,
    **options: Any,
) -> Fitted:
    """Train a model, and write the same files into the run's folder as `python -m cpc_ext.train`.

    Ctrl-C finishes the step, saves, and is raised as KeyboardInterrupt; other signals likewise as SystemExit.

    Args:
        model: a name that `--model` takes; by default "cpc-v1", or the model of the earlier run.
        dataset: a name that `--dataset` takes, or the images themselves, as :func:`cpc_ext.data.from_dataset` takes
            them. Images are stored in the user's cache, as arrays that the run's config names, so that every program
            finds them again. The size of the first image chooses the defaults, as that of a folder's images does.
            Without the option `image_size`, images that cannot keep their own size get the size that the model's preset
            has for such a folder.
        test, unlabeled, classes, workers: as in :func:`cpc_ext.data.from_dataset`, for images that are handed over.
        out_dir: the run's folder; by default the first free runs/MODEL-DATASET-NUMBER.
        resume: resume the run in `out_dir`. Its data need not be handed over again; if they are, they must be the same.
        config: the config.yaml of a run to repeat.
        options: options of the command line, with underscores: ``steps=100, batch_size=32, patch_norm=True``.

    Raises:
        OptionError: options are wrong; it is a ValueError.
        TrainingError: the run cannot start or go on. What from_dataset raises is raised as well.
    """
    named = dataset is None or isinstance(dataset, str)
    if model is not None and not isinstance(model, str):
        raise OptionError(f"model: expected a name, and the data set after it, got {type(model).__name__}")
    if model is not None and model not in MODELS:
        raise OptionError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    if isinstance(dataset, str) and dataset not in DATASETS:
        raise OptionError(
            f"dataset: expected one of {', '.join(DATASETS)}, or the images, got {dataset!r}; files are named by "
            'data_dir, as in dataset="folder", data_dir="photos"'
        )
    if named and not (test is None and unlabeled is None and classes is None and workers == 0):
        raise OptionError("test, unlabeled, classes and workers are of a dataset that is handed over")
    given: dict[str, Any] = {} if model is None else {"model": model}
    if dataset is not None:
        given["dataset"] = dataset if named else NAME
    if not named:
        if "data_dir" in options or "download" in options:
            raise OptionError("data_dir and download would have no effect: the images are handed over")
        if model is not None and model_medium(model) != "images":
            raise OptionError(f"dataset: --model {model} learns from {model_medium(model)}; give the name of such data")
    side = None if named else given_side(dataset)
    folder = None if out_dir is None else Path(out_dir).expanduser()
    choosing = ("recipe", "device", "resume_from", "data_dir", "image_size", "optimizer", *LENGTHS)
    run = _with_options(
        defaults_of(
            **given,
            **{name: options[name] for name in choosing if name in options},
            config=config,
            out_dir=folder,
            resume=resume,
            side=side,
        ),
        given | options,
    )

    def keep() -> Path:
        return keep_dataset(
            dataset,
            test,
            unlabeled=unlabeled,
            classes=classes,
            image_size=run.data.image_size,
            size_of_many=preset_entry(run.model, folder_of("images"), side=side).get("data", {}).get("image_size"),
            workers=workers,
        )

    anew = not resume and config is None and options.get("resume_from") is None
    command = Command(run=run, out_dir=folder, resume=resume, given=frozenset(options), of_preset=anew)
    try:
        with signals_raise():
            status, path = training.run(command, None if named else keep, _resuming)
    except EndedBySignal as ended:
        raise SystemExit(128 + ended.signal) from None
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status:
        raise SystemExit(status)
    summary = path / "summary.json"
    return Fitted(path, json.loads(summary.read_text()) if summary.is_file() else {})


def _resuming(path: Path) -> str:
    """Return the Python call that resumes a run; the run's config names its data."""
    return f"cpc_ext.fit(out_dir={str(path)!r}, resume=True)"


def _with_options(defaults: RunConfig, options: dict[str, Any]) -> RunConfig:
    """Return a config with some options replaced. Raises OptionError for unknown names and wrong values."""
    of = {section: type(values).model_fields for section, values in defaults if isinstance(values, Section)}
    sections = {name: section for section, fields in of.items() for name in fields}
    tree = defaults.model_dump()
    others = options_of_other_models(type(defaults))
    for name, value in options.items():
        if name in sections:
            tree[sections[name]][name] = value
        elif name == "model":
            tree[name] = value
        elif name in others:
            models = ", ".join(others[name])
            raise OptionError(f"{option(name)} is an option of --model {models}; {defaults.model} has no such option")
        else:
            near = difflib.get_close_matches(name, sections, 1)
            raise OptionError(f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        run = validate_config(tree)
    except ValidationError as error:
        raise OptionError(explain(error)) from None
    idle = run.idle()
    for name in options:
        if name in idle:
            raise OptionError(f"{option(name)} would have no effect: {idle[name]}")
    return run
