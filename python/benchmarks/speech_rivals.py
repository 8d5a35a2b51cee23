"""CPC and Greedy InfoMax on speech as CPC_audio and Greedy InfoMax's program formulate them, in plain PyTorch.

The published networks, with losses on gathered negatives: an array of every negative of every position, which is copied
or multiplied once for each predicted step. Written for comparison, from the papers and descriptions of the programs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CPCAudioRival", "GreedyRival"]

KERNELS, STRIDES = (10, 8, 4, 4, 4), (5, 4, 2, 2, 2)
STEPS = 12


class ChannelNorm(nn.Module):
    """Normalises [B, C, L] by mean and unbiased variance over the channels of every frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


def layers(channels: int, paddings: tuple[int, ...], norm: bool) -> list[nn.Sequential]:
    widths = (1, *[channels] * 5)
    return [
        nn.Sequential(
            nn.Conv1d(widths[i], channels, KERNELS[i], STRIDES[i], paddings[i]),
            ChannelNorm(channels) if norm else nn.Identity(),
            nn.ReLU(),
        )
        for i in range(5)
    ]


class CPCAudioRival(nn.Module):
    """CPC_audio: 256 channels, channel norm, LSTM, linear predictors, 128 negatives of any window at other times."""

    def __init__(self, channels: int = 256, negatives: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers(channels, (3, 2, 1, 1, 1), norm=True))
        self.context = nn.LSTM(channels, channels, batch_first=True)
        self.predictors = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(STEPS))
        self.negatives = negatives

    def drawn(self, waveforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return encodings and contexts [B, T, C], and negatives, indices [B, negatives, T - STEPS] of encodings."""
        z = self.encoder(waveforms).transpose(1, 2)
        c, _ = self.context(z)
        batch, length, _ = z.shape
        window = length - STEPS
        chosen = torch.randint(batch, (batch, self.negatives, window))
        shifts = torch.randint(1, length, (batch, self.negatives, window)) + torch.arange(window)
        return z, c, chosen * length + shifts % length

    def forward(self, waveforms: Tensor) -> Tensor:
        z, c, places = self.drawn(waveforms)
        batch, _, window = places.shape
        negatives = z.flatten(0, 1)[places]
        labels = torch.zeros(batch * window, dtype=torch.long, device=z.device)
        total = z.new_zeros(())
        for step, predictor in enumerate(self.predictors, 1):
            positive = z[:, None, step : step + window]
            candidates = torch.cat([positive, negatives], 1)
            scores = (predictor(c[:, None, :window]) * candidates).mean(3)
            total = total + F.cross_entropy(scores.permute(0, 2, 1).reshape(-1, self.negatives + 1), labels)
        return total


class BatchedCPCAudioRival(CPCAudioRival):
    """The same loss with one batched product that scores the negatives, since all steps have the same ones."""

    def forward(self, waveforms: Tensor) -> Tensor:
        z, c, places = self.drawn(waveforms)
        window, channels = places.shape[2], z.shape[2]
        negatives = z.flatten(0, 1)[places.transpose(1, 2).flatten(0, 1)]
        predictions = torch.stack([predictor(c[:, :window]) for predictor in self.predictors], 2).flatten(0, 1)
        positives = torch.stack([z[:, step : step + window] for step in range(1, STEPS + 1)], 2).flatten(0, 1)
        own = (predictions * positives).sum(2, keepdim=True)
        scores = torch.cat([own, predictions @ negatives.transpose(1, 2)], 2) / channels
        return -F.log_softmax(scores.float(), 2)[..., 0].mean() * STEPS


class GreedyLoss(nn.Module):
    """The loss of a module: one matrix for all steps, and S permutations of all positions that the steps share."""

    def __init__(self, context: int, channels: int, samples: int, subsample: int | None) -> None:
        super().__init__()
        self.predictor = nn.Linear(context, channels * STEPS, bias=False)
        self.samples = samples
        self.subsample = subsample

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        batch, length, channels = z.shape
        flat = z.reshape(-1, channels)
        if self.subsample is not None and length > self.subsample:
            begin = int(torch.randint(length - self.subsample, (1,)))
            z, c = z[:, begin : begin + self.subsample], c[:, begin : begin + self.subsample]
        order = torch.stack([torch.randperm(batch * length) for _ in range(self.samples)])
        predictions = self.predictor(c).unflatten(2, (STEPS, channels))
        total = z.new_zeros(())
        for step in range(1, STEPS + 1):
            rows = z.shape[0] * (z.shape[1] - step)
            positive = z[:, step:].reshape(rows, 1, channels)
            negative = flat[order[:, -rows:].T.flatten()].view(rows, self.samples, channels)
            prediction = predictions[:, : z.shape[1] - step, step - 1].reshape(rows, channels, 1)
            scores = torch.cat([positive @ prediction, negative @ prediction], 1).squeeze(2)
            total = total - F.log_softmax(scores, 1)[:, 0].mean()
        return total / STEPS


class GreedyRival(nn.Module):
    """Greedy InfoMax on speech, six modules or with ``end_to_end`` its CPC: 512 channels, GRU of 256, 10 negatives."""

    def __init__(self, *, end_to_end: bool, subsample: int | None, channels: int = 512, context: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers(channels, (2, 2, 2, 2, 1), norm=False))
        self.context = nn.GRU(channels, context, batch_first=True)
        widths = [context] if end_to_end else [*[channels] * 5, context]
        self.losses = nn.ModuleList(GreedyLoss(width, channels, 10, subsample) for width in widths)
        self.end_to_end = end_to_end

    def forward(self, waveforms: Tensor) -> Tensor:
        return sum(self.each_loss(waveforms), waveforms.new_zeros(()))

    def each_loss(self, waveforms: Tensor) -> Iterator[Tensor]:
        """Yield one module's loss after another, so that each can be back-propagated before the next module runs."""
        z = waveforms
        for index, layer in enumerate(self.layers):
            z = layer(z if self.end_to_end else z.detach())
            if not self.end_to_end:
                encodings = z.transpose(1, 2)
                yield self.losses[index](encodings, encodings)
        encodings = (z if self.end_to_end else z.detach()).transpose(1, 2)
        yield self.losses[-1](encodings, self.context(encodings)[0])
