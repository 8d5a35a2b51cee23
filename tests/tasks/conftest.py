"""Tests of tasks have the runs of tests/training."""

from tests.training.conftest import *  # noqa: F403 - fixtures
