"""Training runs: configuration, loop, checkpoints, logging and evaluation."""

from cpc_ext.training.config import RunConfig
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import preset
from cpc_ext.training.program import main
from cpc_ext.training.task import Task

__all__ = ["RunConfig", "Task", "TrainingError", "main", "preset"]
