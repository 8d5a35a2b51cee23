"""The data set of a run, by its options."""

from __future__ import annotations

import warnings
from typing import Any

from cpc_ext.data import load_dataset
from cpc_ext.data.splits import drawn_tenths
from cpc_ext.data_sets import origin
from cpc_ext.training.config import RunConfig
from cpc_ext.training.data_record import data_record, differences
from cpc_ext.training.errors import TrainingError

__all__ = ["changed_data", "load_data"]


def load_data(config: RunConfig, record: dict[str, Any] | None = None) -> Any:
    """The data set of a run: a Dataset of images or a SpeechDataset, as its model takes it.

    record: what the run's checkpoint keeps of its data. Where these are others now, and were those with what version
    0.1.0 held out to test on, they are these.

    TrainingError where it is missing, damaged, or cannot be fetched, or where a library is missing to read it.
    """
    dataset = _load(config)
    if record and origin(config.data.dataset).folder in ("folders", "arrays") and changed_data(record, dataset):
        with drawn_tenths(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # All has been said of these files.
            earlier = _load(config)
        if not changed_data(record, earlier):
            return earlier
    return dataset


def changed_data(record: dict[str, Any], dataset: Any) -> list[str]:
    """What is other in a data set than in a checkpoint's record, of what a run may be trained on."""
    # Some models of images are trained on those with labels alone.
    parts = [part for part in (dataset.pretrain, dataset.train) if part is not None]
    changed = [differences(record, data_record(part)) for part in parts]
    return changed[0] if all(changed) else []


def _load(config: RunConfig) -> Any:
    options = config.data
    try:
        return load_dataset(
            options.dataset,
            options.data_dir,
            download=options.download,
            image_size=options.image_size,
            utterances=options.utterances,
        )
    except (ImportError, MemoryError, OSError, ValueError) as error:
        # They say which file or option is at fault.
        raise TrainingError(f"--dataset {options.dataset}: {error}") from None
