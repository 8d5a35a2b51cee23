"""Contrastive predictive coding of speech as a LightningModule.

    python python/examples/lightning_cpc_audio.py [--steps 300]

The model is that of loop_cpc_audio.py. Copy both files, and replace the generated data by yours. This needs
`pip install lightning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import lightning
import torch
from loop_cpc_audio import WINDOW, make_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cpc_ext.data import WaveformFetcher, WaveformSet, WindowSampler
from cpc_ext.data.audio.drawn.voices import make_voices
from cpc_ext.models import CPC


class Windows(IterableDataset[Tensor]):
    """Batches of windows of recordings, int16 [B, 1, T]."""

    def __init__(self, waveforms: WaveformSet, batch_size: int) -> None:
        self._sampler = WindowSampler(waveforms, batch_size, window=WINDOW)
        self._fetch = WaveformFetcher(waveforms, "cpu", WINDOW)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._fetch, self._sampler)


class LitCPCAudio(lightning.LightningModule):
    """Trains CPC on windows of speech, int16 [B, 1, T], by predicting the next frames."""

    def __init__(self, model: CPC, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        output = self.model(windows)
        self.log_dict({"loss": output.loss, "accuracy": output.accuracy}, prog_bar=True, batch_size=len(windows))
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def main(arguments: Sequence[str] | None = None) -> LitCPCAudio:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--utterances", type=int, default=11, help="utterances to generate of each of 16 voices (default 11)"
    )
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="32-true", help="precision, such as bf16-mixed (default 32-true)")
    options = parser.parse_args(arguments)

    lightning.seed_everything(0)
    loader = DataLoader(Windows(make_voices(options.utterances), options.batch_size), batch_size=None)
    module = LitCPCAudio(make_model())
    trainer = lightning.Trainer(max_steps=options.steps, precision=options.precision, log_every_n_steps=20)
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    main()
