"""Options of models whose modules have separate losses: which modules to train, and in which processes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cpc_ext.training.config import MAY_CHANGE, RunConfig, Section

__all__ = ["ModulesSection", "check_modules_before"]


class ModulesSection(Section):
    """The modules to train, and the processes that train them; subclasses define the number of modules."""

    train_module: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Index, from 0, of the only module to train. The modules before it stay frozen as the run of "
        "--resume-from trained them. None: train all modules at once.",
    )
    pipeline: Annotated[bool, MAY_CHANGE] = Field(
        False,
        description="Under torchrun, train each module in a process, and on a GPU, of its own, which receives the "
        "features of the module before. Otherwise each process trains all modules on its part of the batch.",
    )

    @property
    def count(self) -> int:
        """Number of modules."""
        raise NotImplementedError

    @property
    def learning(self) -> list[int]:
        """Indices of the modules to train."""
        return list(range(self.count)) if self.train_module is None else [self.train_module]

    @property
    def trained(self) -> int | None:
        """See :attr:`RunConfig.trained_modules`."""
        end = self.learning[-1] + 1
        return end if end < self.count else None

    @model_validator(mode="after")
    def _modules_exist(self) -> ModulesSection:
        if self.train_module is not None and self.train_module >= self.count:
            raise ValueError(f"--train-module {self.train_module}: there are {self.count} modules, counted from 0")
        if self.pipeline and (self.train_module is not None or self.count == 1):
            raise ValueError("--pipeline trains several modules at a time: it needs --modules and no --train-module")
        return self


def check_modules_before(modules: ModulesSection, config: RunConfig) -> None:
    """Raise ValueError if modules would be frozen that no run has trained."""
    module = modules.train_module
    if module and config.optimization.resume_from is None:
        raise ValueError(
            f"--train-module {module} needs --resume-from, the folder of the run that trained module {module - 1}"
        )
