"""The data set of a run, by its options."""

from __future__ import annotations

from cpc_ext.data import Dataset, load_dataset
from cpc_ext.training.config import RunConfig
from cpc_ext.training.errors import TrainingError

__all__ = ["load_data"]


def load_data(config: RunConfig) -> Dataset:
    """The data set of a run. TrainingError where it is missing, damaged, or cannot be fetched."""
    options = config.data
    try:
        return load_dataset(options.dataset, options.data_dir, download=options.download, image_size=options.image_size)
    except (MemoryError, OSError, ValueError) as error:
        # They say which file or option is at fault.
        raise TrainingError(f"--dataset {options.dataset}: {error}") from None
