"""Tests of tasks have the runs of tests/training."""

from tests.training.conftest import at_step, one_thread, start, tiny_dataset, train, train_fully

__all__ = ["at_step", "one_thread", "start", "tiny_dataset", "train", "train_fully"]
