"""The task of training Greedy InfoMax: the modules of an encoder, each with a loss of its own, linear probe.

Modules learn all at once, in one process or in one process each; or one after another, each from the outputs of those
before, which may come from the disk. The supervised encoders of the paper's comparison are trained the same way, on
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext import figures
from cpc_ext.data import Dataset, PatchView
from cpc_ext.models import GatedPixelCNNContext, GreedyInfoMax, GreedySupervised, ResNetV2Encoder
from cpc_ext.models.encoders.stacked_encoder import StackedEncoder
from cpc_ext.tasks.encoder_task import EncoderTask, guessing
from cpc_ext.tasks.greedy_infomax.module_inputs import ModuleInputs
from cpc_ext.tasks.greedy_infomax.module_step import ModuleStep
from cpc_ext.tasks.greedy_infomax.options import GreedyConfig
from cpc_ext.tasks.module_task import ModuleTask
from cpc_ext.tasks.online_probe import probe_curve
from cpc_ext.tasks.patches import center_or_random, patch_encoder, patch_view, save_patch_figures
from cpc_ext.training.config import RunConfig
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.task import Fetcher

__all__ = ["TASK", "GreedyTask"]


class GreedyTask(ModuleTask, EncoderTask):
    """Greedy InfoMax (Löwe et al. 2019, arXiv 1905.11786), or supervised modules, on a data set.

    Attributes:
        inputs: inputs of the first module that learns.

    Raises:
        ValueError: modules that do not fit the encoder, images smaller than the crop, or no labels to learn by.
    """

    model: GreedyInfoMax | GreedySupervised
    _config: GreedyConfig
    _view: PatchView

    def __init__(self, config: GreedyConfig, dataset: Dataset, device: torch.device) -> None:
        options, labelled = config.greedy, dataset.train
        if options.objective == "supervised" and (labelled is None or labelled.labels is None):
            raise ValueError(f"--objective supervised: the images of {dataset.name} have no labels")
        super().__init__(config, dataset, device, patch_view(config, dataset), patch_encoder(config, dataset))
        if options.objective == "supervised" and labelled is not None:
            self.examples = labelled
        if options.train_module is not None:
            self.model.freeze(options.train_module)
        self.inputs = ModuleInputs(self.model, self.examples, self._view, config, device)

    def _build(self) -> GreedyInfoMax | GreedySupervised:
        contrast, options = self._config.cpc, self._config.greedy
        encoder = self._encoder_spec.build(self._view.patch_size)
        if not isinstance(encoder, StackedEncoder):
            raise ValueError(f"--encoder {contrast.encoder} has no stacks that modules could be made of")
        if options.init != "he":
            if not isinstance(encoder, ResNetV2Encoder):
                raise ValueError(f"--init {options.init} is for ResNets, not for --encoder {contrast.encoder}")
            encoder.reset_parameters(options.init)
        modules = options.modules if options.split_at is None else options.split_at
        if options.objective == "supervised":
            return GreedySupervised(encoder, modules, classes=len(self._dataset.classes))
        end_to_end = options.count == 1
        return GreedyInfoMax(
            encoder,
            modules,
            context=GatedPixelCNNContext(encoder.out_channels, contrast.context_layers) if end_to_end else None,
            pred_steps=contrast.pred_steps,
            pred_directions=contrast.pred_directions,
            skip=contrast.skip,
            neg_samples=contrast.neg_samples,
            # The processes of a pipeline have no negatives to exchange: each has the whole batch.
            gather_negatives="none" if options.pipeline else contrast.gather_negatives,
        )

    def parts(self) -> list[nn.Module]:
        side = self._config.view.grid_size
        return [ModuleStep(self.model, index, self.inputs, side) for index in self._config.greedy.learning]

    def check_start(self, trained: RunConfig) -> None:
        """Check that the frozen modules were trained by the run to start from, on the same kind of patches."""
        if self.model.frozen == 0 or not isinstance(trained, GreedyConfig):
            return
        self.check_modules(trained.greedy, _shape(trained), _shape(self._config))

    def prepare(self, ranks: Ranks, *, resumed: bool) -> None:
        super().prepare(ranks, resumed=resumed)
        self.inputs.prepare(ranks)

    def fetcher(self, device: torch.device, streams: RandomStreams) -> Fetcher:
        cached = self.inputs.cached_fetcher(device, streams)
        return super().fetcher(device, streams) if cached is None else cached

    def encode(self, model: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the output of the last trained module; those after it are not run. model: one with modules."""
        patches = center_or_random(self._view, images, generator)
        encodings: list[Tensor] = model.encodings_by_module(patches, self._config.greedy.learning[-1] + 1)
        return encodings[-1]

    def thaw(self, model: Any) -> None:
        model.freeze(0)

    def modules(self, stacks: int) -> int | Sequence[int]:
        options = self._config.greedy
        if options.split_at is not None:
            return options.split_at
        # An encoder trained end to end is probed by its stacks, like any other.
        return stacks if options.modules == 1 else options.modules

    @property
    def guess(self) -> dict[str, float]:
        if self._config.greedy.objective == "supervised":
            return guessing(len(self._dataset.classes))
        return guessing(*self._config.keys_by_step(self.contrasted_images))

    def _save_figures(self, run: RunDir) -> None:
        learning = self._config.greedy.learning
        suffixes = [""] if len(learning) == 1 else [f"_module_{module}" for module in learning]
        metrics = read_metrics(run.metrics, having=[name + end for name in ("loss", "accuracy") for end in suffixes])
        if metrics:
            if self._config.greedy.objective == "supervised":
                loss, accuracy = "cross-entropy", "accuracy"
            else:
                loss, accuracy = "InfoNCE loss", "contrastive accuracy"
            probe = probe_curve(run.metrics, self._probe)
            figure = figures.curves_by_module(metrics, learning, self.guess, loss=loss, accuracy=accuracy, probe=probe)
            figures.save(run.path / "curves.png", figure)
        encodings = partial(self.encodings, self.model)
        save_patch_figures(run, self._view, self._shown, encodings, self._config.compute.seed)


TASK = GreedyTask


def _shape(config: GreedyConfig) -> list[dict[str, Any]]:
    """Return the options that define a module and its inputs."""
    return [
        config.view.model_dump(),
        config.cpc.model_dump(include={"encoder", "norm"}),
        config.greedy.model_dump(include={"modules", "split_at"}),
    ]
