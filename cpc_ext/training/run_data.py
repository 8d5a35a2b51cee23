"""The data set of a run, by its options."""

from __future__ import annotations

from typing import Any

from cpc_ext.data import load_dataset
from cpc_ext.training.config import RunConfig
from cpc_ext.training.errors import TrainingError

__all__ = ["load_data"]


def load_data(config: RunConfig) -> Any:
    """The data set of a run: a Dataset of images or a SpeechDataset, as its model takes it.

    TrainingError where it is missing, damaged, or cannot be fetched, or where a library is missing to read it.
    """
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
