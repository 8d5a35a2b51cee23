"""Options of models in modules that learn by losses of their own: which of them learn, and where."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cpc_ext.training.config import MAY_CHANGE, RunConfig, Section

__all__ = ["ModulesSection", "check_modules_before"]


class ModulesSection(Section):
    """Which modules learn, and where; subclasses say how many there are."""

    train_module: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Train this module alone, counted from 0; those before it are frozen, as the run of --resume-from "
        "has trained them. None: all at once.",
    )
    pipeline: Annotated[bool, MAY_CHANGE] = Field(
        False,
        description="Under torchrun: a process, and GPU, for every module, which gets the features of the one before. "
        "Otherwise each process trains all modules on its part of a batch.",
    )

    @property
    def count(self) -> int:
        """Number of modules."""
        raise NotImplementedError

    @property
    def learning(self) -> list[int]:
        """The modules that learn."""
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
    """Raise ValueError if modules are to be frozen that no run has trained."""
    module = modules.train_module
    if module and config.optimization.resume_from is None:
        raise ValueError(
            f"--train-module {module} needs --resume-from, the folder of the run that trained module {module - 1}"
        )
