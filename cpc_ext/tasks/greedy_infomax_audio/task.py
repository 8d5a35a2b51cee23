"""The task of training Greedy InfoMax on speech: modules, each with a loss of its own, linear probes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cpc_ext import figures
from cpc_ext.data import SpeechDataset
from cpc_ext.models import GreedyInfoMax, WaveformEncoder
from cpc_ext.models.encoders.waveform_encoder import KERNELS
from cpc_ext.nn.sequence_info_nce import SequenceInfoNCE
from cpc_ext.nn.typed import Module
from cpc_ext.tasks.greedy_infomax_audio.options import GreedyAudioConfig
from cpc_ext.tasks.module_task import ModuleTask
from cpc_ext.tasks.speech_task import FeatureLayer, SpeechTask, context_layers, sequence_context, waveform_encoder
from cpc_ext.training.config import RunConfig
from cpc_ext.training.precision import autocast
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Handover

__all__ = ["TASK", "GreedyAudioTask"]


class GreedyAudioTask(ModuleTask, SpeechTask):
    """Greedy InfoMax on speech (Löwe et al. 2019, arXiv 1905.11786)."""

    model: GreedyInfoMax
    _config: GreedyAudioConfig

    def __init__(self, config: GreedyAudioConfig, dataset: SpeechDataset, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        if config.greedy.train_module is not None:
            self.model.freeze(config.greedy.train_module)

    def _build(self) -> GreedyInfoMax:
        encoder, options = waveform_encoder(self._config), self._config.greedy
        last = encoder.frames(self._config.view.window)
        # The first module has the most frames.
        longest = last if options.modules == 1 else encoder.frames(self._config.view.window, layers=1)
        count = 5 if options.context_per_module else 1
        frames = longest if options.context_per_module else last
        contexts = [sequence_context(self._config, encoder.out_channels, frames) for _ in range(count)]
        settings = self._config.prediction.objective(longest)
        if options.pipeline:
            # The processes of a pipeline have no negatives to exchange: each has the whole batch.
            settings["gather_negatives"] = "none"
        return GreedyInfoMax(
            encoder,
            min(options.modules, 5),
            context=contexts if options.context_per_module else contexts[0],
            context_module=options.modules == 6,
            objective=SequenceInfoNCE,
            **settings,
        )

    def parts(self) -> list[nn.Module]:
        return [_ModuleStep(self, index) for index in self._config.greedy.learning]

    def check_start(self, trained: RunConfig) -> None:
        """Check that the frozen modules were trained by the run to start from, on the same kind of windows."""
        if self.model.frozen == 0 or not isinstance(trained, GreedyAudioConfig):
            return
        self.check_modules(trained.greedy, _shape(trained), _shape(self._config))

    def layers(self, model: Any) -> list[FeatureLayer]:
        """Return the outputs of trained convolutions, the last named "encoder", then those of a trained context."""

        def encoded(modules: int, waveforms: Tensor) -> Tensor:
            encodings: Tensor = model.encodings_by_module(waveforms, modules)[-1]
            return encodings

        found: list[FeatureLayer] = []
        trained, modules = self._config.greedy.learning[-1] + 1, min(self._config.greedy.modules, 5)
        for count in range(1, min(trained, modules) + 1):
            name = "encoder" if count == modules else f"module{count - 1}"
            # A single module has all convolutions.
            found.append(FeatureLayer(name, partial(encoded, count), count if modules > 1 else len(KERNELS)))
        if trained == self._config.greedy.count:
            context = model.context[-1] if isinstance(model.context, nn.ModuleList) else model.context
            found += context_layers(context, model.encode)
        return found

    @property
    def guesses(self) -> list[dict[str, float]]:
        encoder, options = self.model.encoder, self._config.greedy
        assert isinstance(encoder, WaveformEncoder)
        # A single module has all convolutions; a sixth one is the context network and adds none.
        layers = [len(KERNELS) if options.modules == 1 else min(index + 1, len(KERNELS)) for index in options.learning]
        return self._guesses([encoder.frames(self._config.view.window, layers=count) for count in layers])

    def _curves(self, metrics: list[dict[str, float]], probe: figures.ProbeCurve | None) -> Figure:
        words = {"loss": "InfoNCE loss", "accuracy": "contrastive accuracy"}
        return figures.curves_by_module(metrics, self._config.greedy.learning, self.guesses, **words, probe=probe)


class _ModuleStep(Module):
    """Computes a module's outputs from those of the module before, and its loss, as one of the parts of a step."""

    def __init__(self, task: GreedyAudioTask, index: int) -> None:
        super().__init__()
        model = task.model
        self.module = model.encoder_modules[index]
        self.objective = model.objectives[index]
        self.context = model.context_of(index)
        # The task's model is no submodule, so that parameters() are those that this module trains.
        self._task = (task,)
        self._index = index

    def forward(
        self, given: Handover, labels: Tensor | None, streams: RandomStreams
    ) -> tuple[dict[str, Tensor], Handover]:
        (task,) = self._task
        features, draws = given
        if self._index == task.model.frozen:
            features = self._begin(task, features)
        made = self.module(features)
        if draws is None:
            # The seed of all modules' negatives. Modules in other processes draw the same number themselves.
            draws = int(torch.randint(2**62, (), generator=streams.views))
        generator = torch.Generator(made.device).manual_seed(draws + self._index)
        negatives = task.model.draw_negatives(self._index, made, generator)
        output = task.model.loss(self._index, made, negatives=negatives, speakers=task.speakers(labels))
        values = {name: getattr(output, name) for name in ("loss", "accuracy", "mutual_information")}
        return values, Handover(made.detach(), draws)

    def _begin(self, task: GreedyAudioTask, waveforms: Tensor) -> Tensor:
        """Return the inputs of the first module that learns: the waveforms, or the frozen modules' outputs."""
        features, _ = task.model.encoder.begin(waveforms)
        with torch.no_grad(), autocast(waveforms.device, task.config.compute.precision):
            for module in task.model.encoder_modules[: task.model.frozen]:
                features = module(features)
        return features


TASK = GreedyAudioTask


def _shape(config: GreedyAudioConfig) -> list[dict[str, Any]]:
    """Return the options that define a module."""
    return [config.encoder.model_dump(), config.greedy.model_dump(include={"modules"})]
