"""Networks that predict the encodings of a step from contexts, [B, T, E] → [B, T, D]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.nn.causal_attention import CausalTransformerLayer
from cpc_ext.nn.typed import Module

__all__ = ["PREDICTORS", "step_predictor"]


class EqualizedLinear(nn.Linear):
    """A linear layer with weights initialised as N(0, 1), and its result times sqrt(2 / in) (Karras et al. 2018)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(2 / self.in_features)


class _FeedForwardPredictor(Module):
    """Two equalised linear layers with a ReLU in between."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.expand = EqualizedLinear(in_channels, channels)
        self.contract = EqualizedLinear(channels, channels)

    def forward(self, contexts: Tensor) -> Tensor:
        predictions: Tensor = self.contract(torch.relu(self.expand(contexts)))
        return predictions


class _ConvPredictor(Module):
    """An equalised causal convolution of the contexts, padded with zeros before the first."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, in_channels, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, contexts: Tensor) -> Tensor:
        kernel = self.weight.shape[2]
        padded = F.pad(contexts.transpose(1, 2), (kernel - 1, 0))
        convolved = F.conv1d(padded, self.weight, self.bias).transpose(1, 2)
        return convolved * math.sqrt(2 / self.weight[0].numel())


class _LSTMPredictor(Module):
    """An LSTM with an initial state of zeros."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_channels, channels, batch_first=True)

    def forward(self, contexts: Tensor) -> Tensor:
        predictions: Tensor = self.lstm(contexts)[0]
        return predictions


# Factories of a step's predictor, of (E, D, positions of a transformer); None for matrices, which the objective holds.
PREDICTORS: dict[str, Callable[[int, int, int], Module] | None] = {
    "linear": None,
    "transformer": lambda contexts, encodings, positions: CausalTransformerLayer(contexts, positions),
    "ffd": lambda contexts, encodings, positions: _FeedForwardPredictor(contexts, encodings),
    "conv4": lambda contexts, encodings, positions: _ConvPredictor(contexts, encodings, 4),
    "conv8": lambda contexts, encodings, positions: _ConvPredictor(contexts, encodings, 8),
    "conv12": lambda contexts, encodings, positions: _ConvPredictor(contexts, encodings, 12),
    "lstm": lambda contexts, encodings, positions: _LSTMPredictor(contexts, encodings),
}


def step_predictor(kind: str, contexts: int, encodings: int, positions: int) -> Module:
    """Make a predictor of a kind other than "linear", for the given numbers of channels.

    ValueError for a transformer where contexts and encodings differ in width.
    """
    if kind == "transformer" and contexts != encodings:
        raise ValueError(f"transformer predictors need contexts as wide as encodings, got {contexts} and {encodings}")
    made = PREDICTORS[kind]
    assert made is not None
    return made(contexts, encodings, positions)
