"""The tasks by the names of their models."""

from __future__ import annotations

from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.tasks.cpc_v2.task import CPCv2Task
from cpc_ext.tasks.greedy_infomax.task import GreedyTask
from cpc_ext.tasks.pixelcnn.task import PixelCNNTask
from cpc_ext.tasks.simclr.task import SimCLRTask
from cpc_ext.training.task import Task

__all__ = ["TASKS"]

TASKS: dict[str, type[Task]] = {
    "cpc-v1": CPCv1Task,
    "cpc-v2": CPCv2Task,
    "pixelcnn": PixelCNNTask,
    "gated-pixelcnn": PixelCNNTask,
    "pixelcnn++": PixelCNNTask,
    "simclr": SimCLRTask,
    "greedy-infomax": GreedyTask,
}
