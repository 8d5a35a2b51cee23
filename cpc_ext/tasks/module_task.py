"""The common part of the tasks of models in modules: the sum of losses, and which runs modules may start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cpc_ext.models import GreedyInfoMax, GreedySupervised
from cpc_ext.tasks.module_options import ModulesSection
from cpc_ext.training.config import option
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Handover, Task

__all__ = ["ModuleTask"]

# Options that define a module and its inputs, by name, section by section.
Shape = Sequence[Mapping[str, Any]]


class ModuleTask(Task):
    """A task whose parts are modules that learn by losses of their own."""

    model: Any  # A GreedyInfoMax or GreedySupervised.

    def losses(self, batch: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        """Return the losses of all modules that learn, summed; steps take them one by one, see :meth:`parts`."""
        total: dict[str, Tensor] = {}
        handed = Handover(batch)
        for part in self.parts():
            values, handed = part(handed, labels, streams)
            total = {name: total.get(name, 0) + value for name, value in values.items()}
        return total

    def compile(self) -> None:
        for module in self.model.encoder_modules:
            module.compile()

    def check_modules(self, trained: ModulesSection, theirs: Shape, mine: Shape) -> None:
        """Raise TrainingError if the frozen modules differ from those of a trained run, or were not trained there.

        trained: options of that run's modules. theirs, mine: options that define a module, in that run and in this one.
        """
        different = [
            f"{option(name)} is {before[name]} there, {value} here"
            for before, now in zip(theirs, mine, strict=True)
            for name, value in now.items()
            if before[name] != value
        ]
        if different:
            raise TrainingError("--resume-from: the modules of that run are others: " + "; ".join(different))
        model: GreedyInfoMax | GreedySupervised = self.model
        module, last = trained.train_module, model.frozen - 1
        if module is not None and module < last:
            raise TrainingError(
                f"--resume-from: that run trained module {module}; --train-module {model.frozen} needs the run "
                f"that trained module {last}"
            )
