"""The step of one module of Greedy InfoMax, as one of the parts that the training loop runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cpc_ext.models import GreedyInfoMax, GreedySupervised
from cpc_ext.models.greedy_infomax import pooled
from cpc_ext.nn.typed import Module
from cpc_ext.tasks.greedy_infomax.module_inputs import ModuleInputs
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Handover

__all__ = ["ModuleStep"]


class ModuleStep(Module):
    """Computes a module's outputs from those of the module before, and its loss.

    Args:
        model: model of the module.
        index: index of the module.
        inputs: inputs of the first module that learns.
        grid_size: patches along a side of the grid.
    """

    def __init__(
        self, model: GreedyInfoMax | GreedySupervised, index: int, inputs: ModuleInputs, grid_size: int
    ) -> None:
        super().__init__()
        self.module = model.encoder_modules[index]
        self.objective = model.objectives[index]
        if isinstance(model, GreedyInfoMax) and index == len(model.encoder_modules) - 1:
            self.context = model.context
        # The tuple keeps the model from being a submodule, so that parameters() are those that this module trains.
        self._model = (model,)
        self._index = index
        self._inputs = inputs if index == model.frozen else None
        self._grid = (grid_size, grid_size)

    def forward(
        self, given: Handover, labels: Tensor | None, streams: RandomStreams
    ) -> tuple[dict[str, Tensor], Handover]:
        (model,) = self._model
        features, draws = given
        if self._inputs is not None:
            features = self._inputs(features, streams)
        made = self.module(features)
        rows, columns = self._grid
        encodings = pooled(made, (len(made) // (rows * columns), rows, columns))
        handed = made.detach()
        # Keep no more of the graph alive than the loss needs.
        del made
        if isinstance(model, GreedySupervised):
            assert labels is not None  # The task has checked it.
            output: Any = model.loss(self._index, encodings, labels=labels)
            return output._asdict(), Handover(handed)
        if draws is None:
            draws = model.draw_negatives(self._index, encodings, streams.negatives)
        output = model.loss(self._index, encodings, negatives=draws)
        values = {name: getattr(output, name) for name in ("loss", "accuracy", "mutual_information")}
        return values, Handover(handed, draws)
