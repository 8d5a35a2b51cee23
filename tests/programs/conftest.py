"""Makes the fixtures of tests/training available to tests of programs."""

from tests.training.conftest import *  # noqa: F403 - fixtures
