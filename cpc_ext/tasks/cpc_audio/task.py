"""The task of training CPC on speech: windows of recordings, contrastive loss, linear probes of phones and speakers."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from cpc_ext import figures
from cpc_ext.models import CPC
from cpc_ext.nn.sequence_info_nce import SequenceInfoNCE
from cpc_ext.tasks.speech_task import FeatureLayer, SpeechTask, context_layers, sequence_context, waveform_encoder
from cpc_ext.training.random_streams import RandomStreams

__all__ = ["TASK", "CPCAudioTask"]


class CPCAudioTask(SpeechTask):
    """CPC on speech (van den Oord et al. 2018, arXiv 1807.03748; Rivière et al. 2020, arXiv 2002.02848)."""

    model: CPC

    def _build(self) -> CPC:
        encoder = waveform_encoder(self._config)
        frames = encoder.frames(self._config.view.window)
        context = sequence_context(self._config, encoder.out_channels, frames)
        settings = self._config.prediction.objective(frames)
        return CPC(encoder, context, SequenceInfoNCE(encoder.out_channels, context.out_channels, **settings))

    def losses(self, batch: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        output = self.model(batch, generator=streams.negatives, speakers=self.speakers(labels))
        return {"loss": output.loss, "accuracy": output.accuracy, "mutual_information": output.mutual_information}

    def layers(self, model: Any) -> list[FeatureLayer]:
        return [FeatureLayer("encoder", model.encode), *context_layers(model.context, model.encode)]

    def _curves(self, metrics: list[dict[str, float]], probe: figures.ProbeCurve | None) -> Figure:
        words = {"loss": "InfoNCE loss", "accuracy": "contrastive accuracy"}
        return figures.curves(metrics, self.guess, **words, probe=probe)


TASK = CPCAudioTask
