"""Starting a new run from the weights of another run's last checkpoint instead of random ones."""

from __future__ import annotations

from pydantic import ValidationError
from torch import Tensor

from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import explain, validate_config
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.task import Task

__all__ = ["take_weights"]

# Error messages list at most this many weights.
_SHOWN = 5


def take_weights(task: Task, run: RunDir) -> None:
    """Load all weights of a run's last checkpoint into a task's model; optimizer, step and data order stay new.

    Raises TrainingError if there is no checkpoint, or if the names, shapes or kinds of its weights are not the model's.
    """
    if not run.checkpoint.is_file():
        raise TrainingError(f"--resume-from: there is no checkpoint at {run.checkpoint}")
    state = load_checkpoint(run.checkpoint)
    try:
        saved = validate_config(state["config"])
        weights: dict[str, Tensor] = state["model"]
    except (KeyError, ValidationError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else f"it has no {error.args[0]}"
        raise TrainingError(f"--resume-from: {run.checkpoint} does not fit this run: {reason}") from None
    task.check_start(saved)
    mine = task.model.state_dict()
    different = [f"{name} is missing there" for name in mine if name not in weights]
    different += [f"{name} is missing here" for name in weights if name not in mine]
    different += [
        f"{name} is {list(weights[name].shape)} there, {list(value.shape)} here"
        for name, value in mine.items()
        if name in weights and weights[name].shape != value.shape
    ]
    different += [
        f"{name} is {weights[name].dtype} there, {value.dtype} here"
        for name, value in mine.items()
        if name in weights and weights[name].is_floating_point() != value.is_floating_point()
    ]
    if different:
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise TrainingError(
            f"--resume-from: the weights of {run.path}, a run of {saved.model}, are of another model: "
            + "; ".join(different[:_SHOWN])
            + more
        )
    task.start(weights)
