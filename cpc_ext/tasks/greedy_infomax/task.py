"""The task of training Greedy InfoMax: the modules of an encoder, each with a loss of its own, linear probe.

Modules learn all at once, in one process or each in its own, or one after another, on what those before it make, which
may come from the disk. The supervised encoders of the paper's comparison are trained the same way, on labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext import figures
from cpc_ext.data import Dataset
from cpc_ext.models import GatedPixelCNNContext, GreedyInfoMax, GreedySupervised, PatchEncoder, ResNetV2Encoder
from cpc_ext.models.encoders.stacked_encoder import StackedEncoder
from cpc_ext.models.greedy_infomax import pooled
from cpc_ext.nn.typed import Module
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.tasks.encoder_task import save_encoder
from cpc_ext.tasks.greedy_infomax.options import GreedyConfig
from cpc_ext.tasks.greedy_infomax.output_cache import OutputCache
from cpc_ext.training.config import RunConfig, option
from cpc_ext.training.data_record import fingerprint
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.precision import autocast
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.task import Fetcher, Handover

__all__ = ["TASK", "GreedyTask"]


class GreedyTask(CPCv1Task):
    """Greedy InfoMax, or supervised modules, on a data set.

    Raises:
        ValueError: modules that do not fit the encoder, images smaller than the crop, or no labels to learn by.
    """

    _config: GreedyConfig
    model: GreedyInfoMax | GreedySupervised

    def __init__(self, config: GreedyConfig, dataset: Dataset, device: torch.device) -> None:
        self._options = config.greedy
        labelled = dataset.train
        if self._supervised and (labelled is None or labelled.labels is None):
            raise ValueError(f"--objective supervised: the images of {dataset.name} have no labels")
        super().__init__(config, dataset, device)
        if self._supervised and labelled is not None:
            self.images = labelled
        if self._options.train_module is not None:
            self.model.freeze(self._options.train_module)
        self._cached = False

    def parts(self) -> list[nn.Module]:
        return [_ModuleStep(self, index) for index in self._learning]

    def compile(self) -> None:
        for module in self.model.encoder_modules:
            module.compile()

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        """The loss of all modules that learn, summed; the steps take them one by one, see :meth:`parts`."""
        total: dict[str, Tensor] = {}
        handed = Handover(images)
        for part in self.parts():
            values, handed = part(handed, labels, streams)
            total = {name: total.get(name, 0) + value for name, value in values.items()}
        return total

    def check_start(self, trained: RunConfig) -> None:
        """Modules that are frozen have to be trained, on patches like these."""
        if self.model.frozen == 0 or not isinstance(trained, GreedyConfig):
            return
        different = [
            f"{option(name)} is {theirs[name]} there, {value} here"
            for theirs, mine in zip(_shape(trained), _shape(self._config), strict=True)
            for name, value in mine.items()
            if theirs[name] != value
        ]
        if different:
            raise TrainingError("--resume-from: the modules of that run are others: " + "; ".join(different))
        module, last = trained.greedy.train_module, self.model.frozen - 1
        if module is not None and module < last:
            raise TrainingError(
                f"--resume-from: that run trained module {module}; --train-module {self.model.frozen} needs the run "
                f"that trained module {last}"
            )

    def prepare(self, ranks: Ranks, *, resumed: bool) -> None:
        if self._options.cache_outputs is not None:
            key = self._cache_key()
            generator = torch.Generator().manual_seed(self._config.compute.seed)
            ranks.on_main(
                lambda: OutputCache.fill(
                    self._cache_path,
                    key,
                    self.images,
                    lambda images: self._frozen_outputs(self._view.random(images, generator)),
                    self._device,
                    views=self._options.cache_views,
                )
            )
            self._cached = True

    def fetcher(self, device: torch.device, streams: RandomStreams) -> Fetcher:
        if not self._cached:
            return super().fetcher(device, streams)
        return OutputCache(self._cache_path, self._cache_key(), self.images, device, streams)

    def first_features(self, batch: Tensor, streams: RandomStreams) -> Tensor:
        """What the first module that learns gets: of uint8 images, or outputs of the modules before as cached."""
        if self._cached:
            return batch.flatten(0, 1)
        patches = self._view.random(batch, streams.views, share=streams.share)
        if self.model.frozen == 0:
            return patches.flatten(0, 2)
        return self._frozen_outputs(patches).flatten(0, 1)

    def encode(self, model: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The output of the last module that is trained; those after it are not run. model: one in modules."""
        patches = self._view.center(images) if generator is None else self._view.random(images, generator)
        encodings: list[Tensor] = model.encodings_by_module(patches, self._learning[-1] + 1)
        return encodings[-1]

    def modules(self, stacks: int) -> int | Sequence[int]:
        if self._options.split_at is not None:
            return self._options.split_at
        # Trained end to end it has stacks like any other encoder.
        return stacks if self._options.modules == 1 else self._options.modules

    def save(self, run: RunDir) -> None:
        save_encoder(run, self.model.encoder, self._encoder_spec(), self._view, self._config)
        suffixes = [""] if len(self._learning) == 1 else [f"_module_{module}" for module in self._learning]
        metrics = read_metrics(run.metrics, having=[name + end for name in ("loss", "accuracy") for end in suffixes])
        if metrics:
            figures.save(run.path / "curves.png", figures.curves_by_module(metrics, self._learning, self._guessing()))
        self._save_inputs(run)
        self._save_neighbours(run)

    @property
    def _supervised(self) -> bool:
        return self._options.objective == "supervised"

    @property
    def _learning(self) -> list[int]:
        """The modules that learn."""
        only = self._options.train_module
        return list(range(self._options.count)) if only is None else [only]

    @torch.no_grad()
    def _frozen_outputs(self, patches: Tensor) -> Tensor:
        """Patches [B, rows, cols, C, p, p] → feature maps of the last frozen module, [B, rows·cols, D, h, w]."""
        features = patches.flatten(0, 2)
        with autocast(self._device, self._config.compute.precision):
            for module in self.model.encoder_modules[: self.model.frozen]:
                features = module(features)
        return torch.unflatten(features, 0, (len(patches), -1))

    def _guessing(self) -> dict[str, float]:
        if not self._supervised:
            return super()._guessing()
        classes = len(self._dataset.classes)
        return {"loss": math.log(classes), "accuracy": 1 / classes}

    def _cpc(self, encoder: PatchEncoder) -> GreedyInfoMax | GreedySupervised:
        """The whole model around an encoder."""
        config, options = self._config, self._options
        if not isinstance(encoder, StackedEncoder):
            raise ValueError(f"--encoder {config.cpc.encoder} has no stacks that modules could be made of")
        if options.init != "he":
            if not isinstance(encoder, ResNetV2Encoder):
                raise ValueError(f"--init {options.init} is for ResNets, not for --encoder {config.cpc.encoder}")
            encoder.reset_parameters(options.init)
        modules = options.modules if options.split_at is None else options.split_at
        if self._supervised:
            return GreedySupervised(encoder, modules, classes=len(self._dataset.classes))
        end_to_end = options.count == 1
        return GreedyInfoMax(
            encoder,
            modules,
            context=GatedPixelCNNContext(encoder.out_channels, config.cpc.context_layers) if end_to_end else None,
            pred_steps=config.cpc.pred_steps,
            pred_directions=config.cpc.pred_directions,
            skip=config.cpc.skip,
            neg_samples=config.cpc.neg_samples,
            # The processes of a pipeline have no negatives to exchange: each has the whole batch.
            gather_negatives="none" if options.pipeline else config.cpc.gather_negatives,
        )

    @property
    def _cache_path(self) -> Path:
        assert self._options.cache_outputs is not None  # Who asks has a cache.
        return self._options.cache_outputs / f"module-{self.model.frozen - 1}.bin"

    def _cache_key(self) -> str:
        config = self._config
        weights = {
            f"{index}.{name}": value
            for index, module in enumerate(self.model.encoder_modules[: self.model.frozen])
            for name, value in module.state_dict().items()
        }
        return fingerprint(
            self.images,
            weights,
            view=repr(self._view),
            views=self._options.cache_views,
            seed=config.compute.seed,
        )


TASK = GreedyTask


def _shape(config: GreedyConfig) -> list[dict[str, Any]]:
    """The options that decide what a module is and what it sees."""
    return [
        config.view.model_dump(),
        config.cpc.model_dump(include={"encoder", "norm"}),
        config.greedy.model_dump(include={"modules", "split_at"}),
    ]


class _ModuleStep(Module):
    """What one module does in a step: its outputs from those of the module before, and its loss."""

    def __init__(self, task: GreedyTask, index: int) -> None:
        super().__init__()
        model = task.model
        self.module = model.encoder_modules[index]
        self.objective = model.objectives[index]
        if isinstance(model, GreedyInfoMax) and index == len(model.encoder_modules) - 1:
            self.context = model.context
        self._task = task
        # Neither is a child of this module, whose parameters are those that it trains.
        self._model = (model,)
        self._index = index
        self._first = index == task.model.frozen
        self._side = task._config.view.grid_size

    def forward(
        self, given: Handover, labels: Tensor | None, streams: RandomStreams
    ) -> tuple[dict[str, Tensor], Handover]:
        (model,) = self._model
        features, draws = given
        if self._first:
            features = self._task.first_features(features, streams)
        made = self.module(features)
        encodings = pooled(made, (len(made) // self._side**2, self._side, self._side))
        handed = made.detach()
        # The graph is to hold no more than the loss needs.
        del made
        if isinstance(model, GreedySupervised):
            assert labels is not None  # The task saw to it.
            output: Any = model.loss(self._index, encodings, labels=labels)
            return output._asdict(), Handover(handed)
        if draws is None:
            draws = model.draw_negatives(self._index, encodings, streams.negatives)
        output = model.loss(self._index, encodings, negatives=draws)
        values = {name: getattr(output, name) for name in ("loss", "accuracy", "mutual_information")}
        return values, Handover(handed, draws)
