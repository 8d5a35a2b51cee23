"""Loading the data set that a run's options name."""

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
    """Load the data set of a run: a Dataset of images or a SpeechDataset.

    Args:
        config: the run's config.
        record: the data record of the run's checkpoint, if there is one. If the data do not match it, but do with the
            test split of version 0.1.0, they are returned with that split.

    Raises:
        TrainingError: the data set is missing, damaged or cannot be fetched, or a library to read it is missing.
    """
    dataset = _load(config)
    if record and origin(config.data.dataset).folder in ("folders", "arrays") and changed_data(record, dataset):
        with drawn_tenths(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The first load has already warned about these files.
            earlier = _load(config)
        if not changed_data(record, earlier):
            return earlier
    return dataset


def changed_data(record: dict[str, Any], dataset: Any) -> list[str]:
    """Return how the training data differ from a checkpoint's record; empty if any part for training matches."""
    # Most models train on the pretraining images, some on the labelled images only.
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
        # The messages name the file or option at fault.
        raise TrainingError(f"--dataset {options.dataset}: {error}") from None
