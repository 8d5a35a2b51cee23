"""What tasks of models in modules share: the sum of the losses, and which runs the modules may start from."""

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

# Options by name, section by section, that decide what a module is and what it sees.
Shape = Sequence[Mapping[str, Any]]


class ModuleTask(Task):
    """A task whose parts are modules that learn by losses of their own."""

    model: Any  # A GreedyInfoMax or GreedySupervised.

    def losses(self, batch: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        """The loss of all modules that learn, summed; the steps take them one by one, see :meth:`parts`."""
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
        """TrainingError where the frozen modules are not those of a trained run, or not trained there.

        trained: that run's modules. theirs, mine: what decides what a module is, there and here.
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
