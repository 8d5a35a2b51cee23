"""The objective of contrastive predictive coding on sequences: contexts predict the encodings some frames ahead.

Encodings [B, D, L] and contexts [B, E, L] give the InfoNCE loss of every step, and their mean or sum. Sampled negatives
are indices into the encodings, which are never gathered, and linear predictions are never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, gather_from_ranks, ring_info_nce
from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput, step_rows
from cpc_ext.nn.log_count import log_count
from cpc_ext.nn.sequence_negatives import SAMPLINGS, SequenceNegatives, Windowed, checked_draws, draw, frames_of
from cpc_ext.nn.step_predictors import PREDICTORS, step_predictor
from cpc_ext.nn.typed import Module, ModuleList
from cpc_ext.ops._checks import check_dense, check_floating, check_integer
from cpc_ext.ops._contrast_arguments import INTEGERS
from cpc_ext.ops.info_nce import info_nce
from cpc_ext.ops.predict_and_contrast import predict_and_contrast

__all__ = ["SequenceInfoNCE", "SequenceInfoNCEOutput", "SequenceNegatives"]

_CHOICES = {
    "sampling": SAMPLINGS,
    "predictor": tuple(PREDICTORS),
    "reduction": ("mean", "sum"),
    "score": ("dot", "mean"),
    "start": ("uniform", "cpc-audio"),
    "gather_negatives": EXCHANGES,
}


class SequenceInfoNCEOutput(GridInfoNCEOutput):
    """Results of :class:`SequenceInfoNCE`: the attributes of :class:`GridInfoNCEOutput`, except for these.

    Attributes:
        loss: scalar in nats, the mean over positions, then the mean or the sum over steps.
        step_losses, step_accuracies: [steps].
    """

    __slots__ = ()


class _Keys(NamedTuple):
    """The keys that predictions are contrasted with: the encodings of all sequences [N, D], frame by frame.

    targets: int64 [B, T_k] for each step. negatives: int64 [B, T_k, S] for each step; None for all keys.
    groups: those of sequences [B] and of keys [N]; None if all keys may be contrasted. ring: whether to contrast the
    keys of other ranks in a ring.
    """

    keys: Tensor
    targets: list[Tensor]
    negatives: list[Tensor] | None
    groups: tuple[Tensor, Tensor] | None
    ring: bool


class SequenceInfoNCE(Module):
    """Predict encodings from contexts and contrast them (van den Oord et al. 2018, arXiv 1807.03748, section 3.1).

    For step k = 1..K the context at frame t predicts the encoding at frame t + k. The defaults are Greedy InfoMax's
    (Löwe et al. 2019, arXiv 1905.11786). CPC_audio (Rivière et al. 2020, arXiv 2002.02848) has ``sampling="shifted",
    neg_samples=128, common_positions=True, reduction="sum", score="mean", start="cpc-audio"``.

    Args:
        encoding_channels: number D of channels of the encodings.
        context_channels: number E of channels of the contexts. Default: D.
        pred_steps: number K of steps ahead.
        predictor: the network that computes predictions from contexts, a separate one for each step:

            - "linear": a matrix W_k, with the score ``zᵀ W_k c``;
            - "transformer": a :class:`~cpc_ext.nn.CausalTransformerLayer` with 8 heads, for E = D;
            - "ffd": two linear layers with a ReLU in between; "conv4", "conv8", "conv12": a convolution of the last 4,
              8 or 12 contexts. Their weights are initialised as N(0, 1), their results multiplied by sqrt(2 / inputs);
            - "lstm": an LSTM with an initial state of zeros.
        sampling: how negatives are drawn; the positive may be among them unless stated otherwise:

            - "permuted": by permutations of all frames of the batch, so that none is used more often than others; the
              steps share them;
            - "offsets": from the step's targets in the batch, separately for each step, without the positive;
            - "same-sequence": by permutations of time, which the batch and the steps share;
            - "shifted": from any sequence of the batch at any time but t, the same for all steps;
            - "all": every frame of the batch but the positive.
        neg_samples: number S of negatives of each position; unused with ``sampling="all"``.
        exclude_positive: for "shifted", whether the K frames that are predicted at t are never drawn as its negatives.
        same_speaker: whether to contrast only negatives of the same speaker; drawn ones of others are left out.
        subsample: length of a window, drawn for each batch, that is scored in longer sequences. "offsets" draws
            negatives from this window, "same-sequence" from another window of the permuted frames, and the other
            samplings from all frames.
        common_positions: whether all steps are predicted at the same L - K positions, instead of L - k for step k.
        reduction: "mean" or "sum" of the steps' losses.
        score: "dot", or "mean": the dot product divided by D.
        start: initialisation of the W_k: "uniform" in ±E**-0.5, as in :class:`torch.nn.Linear`; "cpc-audio", if D > E:
            N(0, 1) for the first E encoding channels and a hundredth of that for the others.
        dropout: dropout rate of predictions.
        window: length L of the longest sequence for transformers.
        reverse: whether to reverse time, so that the past is predicted. Draws then count frames from the end.
        gather_negatives: whose frames to contrast where several processes share a batch: "none", "gather" or "ring",
            see :class:`cpc_ext.nn.GridInfoNCE`.

    Attributes:
        weight: [K, D, E], the W_k; None for other predictors.
        predictors: the networks of each step for the other predictors.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, or an unsupported combination.
    """

    def __init__(
        self,
        encoding_channels: int,
        context_channels: int | None = None,
        *,
        pred_steps: int = 12,
        predictor: str = "linear",
        sampling: str = "permuted",
        neg_samples: int = 10,
        exclude_positive: bool = False,
        same_speaker: bool = False,
        subsample: int | None = None,
        common_positions: bool = False,
        reduction: str = "mean",
        score: str = "dot",
        start: str = "uniform",
        dropout: float = 0.0,
        window: int = 128,
        reverse: bool = False,
        gather_negatives: str = "none",
    ) -> None:
        super().__init__()
        self.encoding_channels = encoding_channels
        self.context_channels = encoding_channels if context_channels is None else context_channels
        self.pred_steps = pred_steps
        self.predictor = predictor
        self.sampling = sampling
        self.neg_samples = neg_samples
        self.exclude_positive = exclude_positive
        self.same_speaker = same_speaker
        self.subsample = subsample
        self.common_positions = common_positions
        self.reduction = reduction
        self.score = score
        self.start = start
        self.window = window
        self.reverse = reverse
        self.gather_negatives = gather_negatives
        self._check_settings()
        self.dropout = nn.Dropout(dropout)
        self.weight = None
        if predictor == "linear":
            self.weight = nn.Parameter(torch.empty(pred_steps, encoding_channels, self.context_channels))
        # With common positions, all steps have as many as the last one.
        positions = window - (pred_steps if common_positions else 1)
        self.predictors = ModuleList(
            step_predictor(predictor, self.context_channels, encoding_channels, positions)
            for _ in range(0 if predictor == "linear" else pred_steps)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the W_k again."""
        if self.weight is None:
            return
        channels = self.context_channels
        if self.start == "cpc-audio" and self.encoding_channels > channels:
            nn.init.normal_(self.weight)
            with torch.no_grad():
                self.weight[:, channels:] *= 0.01
        else:
            nn.init.uniform_(self.weight, -(channels**-0.5), channels**-0.5)

    def forward(
        self,
        encodings: Tensor,
        contexts: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: SequenceNegatives | Tensor | Sequence[Tensor] | None = None,
        speakers: Tensor | None = None,
    ) -> SequenceInfoNCEOutput:
        """Compute loss and accuracy of predicting ahead.

        Args:
            encodings: z, [B, D, L].
            contexts: c, [B, E, L].
            generator: draws the negatives, on its own device. Default: PyTorch's generator of the encodings' device.
            negatives: the draws themselves instead, as :meth:`draw_negatives` gives them, or their ``places``; under
                ``gather_negatives="gather"`` those of all processes.
            speakers: integers [B], the speaker of each sequence; required for ``same_speaker``.

        Raises:
            TypeError, ValueError: tensors of the wrong type or shape, or sequences of no more than ``pred_steps``
                frames; negatives of the wrong form, or given although all are contrasted.
            IndexError: on the CPU, a negative that names no frame.
        """
        self._check(encodings, contexts, speakers)
        if self.reverse:
            encodings, contexts = encodings.flip(2), contexts.flip(2)
        exchange = exchange_with(self.gather_negatives)
        candidates = exchange.gathered(encodings)
        of = self._windowed(candidates)
        draws = self._drawn(candidates, of, generator, negatives)
        own = exchange.own_of(encodings.shape[0])
        contexts = contexts.transpose(1, 2)
        first = torch.arange(of.sequences, device=encodings.device)[own, None] * of.frames
        frames = torch.arange(of.window, device=encodings.device)
        if draws.begin is not None:
            frames = frames + draws.begin
            contexts = contexts.index_select(1, frames)
        targets = [first + frames[step : step + count] for step, count in enumerate(of.counts, start=1)]
        sampled = None if self.sampling == "all" else frames_of(draws, self.sampling, of, own)
        groups = None
        if speakers is not None:
            everyone = gather_from_ranks(speakers) if exchange.world > 1 else speakers
            groups = speakers, everyone.repeat_interleave(of.frames)
        keys = _Keys(candidates.transpose(1, 2).flatten(0, 1), targets, sampled, groups, exchange.ring)
        if self._linear and groups is None and not keys.ring:
            mean, losses, accuracies = self._contrast_linear(contexts, keys)
        else:
            losses, accuracies = self._predict(contexts, keys)
            mean = losses.mean()
        return SequenceInfoNCEOutput(
            mean if self.reduction == "mean" else mean * self.pred_steps,
            accuracies.mean(),
            self._log_contrasted(keys, exchange.world, mean.detach()) - mean.detach(),
            losses.detach(),
            accuracies,
        )

    def draw_negatives(self, encodings: Tensor, generator: torch.Generator | None = None) -> SequenceNegatives | None:
        """Draw negatives as :meth:`forward` would for these encodings, in the form that it takes.

        encodings: [B, D, L], of which only the shape and the device matter. Returns None if nothing is drawn.
        """
        world = exchange_with(self.gather_negatives).world
        of = self._windowed(encodings, encodings.shape[0] * world)
        return self._draw(encodings.device, of, generator) if self.sampling != "all" or of.partial else None

    def extra_repr(self) -> str:
        return (
            f"{self.encoding_channels}, {self.context_channels}, pred_steps={self.pred_steps}, "
            f"predictor={self.predictor}, sampling={self.sampling}, neg_samples={self.neg_samples}, "
            f"reduction={self.reduction}, score={self.score}"
        )

    def _predict(self, contexts: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
        """Return losses and accuracies [steps] for contexts [B, window, E]."""
        results = []
        for step, targets in enumerate(keys.targets):
            given = contexts[:, : targets.shape[1]]
            made = given @ self.weight[step].t() if self.weight is not None else self.predictors[step](given)
            results.append(self._contrast(self.dropout(made), step, keys))
        losses, accuracies = zip(*results, strict=True)
        return torch.stack(losses), torch.stack(accuracies)

    @property
    def _linear(self) -> bool:
        """Return whether predictions are only products with the W_k."""
        return self.weight is not None and (self.dropout.p == 0 or not self.training)

    def _contrast_linear(self, contexts: Tensor, keys: _Keys) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss of contexts [B, window, E], with its gradient, and losses and accuracies [steps]."""
        assert self.weight is not None
        window = contexts.shape[1]
        negatives = None
        if keys.negatives is not None:
            # Negatives that the steps share are passed once: those of the first step cover the most contexts.
            shared = self.sampling == "shifted"
            negatives = step_rows(keys.negatives[:1] if shared else keys.negatives, window, absent=0)
            negatives = negatives[0] if shared else negatives
        loss, _, _, losses, accuracies = predict_and_contrast(
            contexts,
            self.weight,
            keys.keys,
            step_rows(keys.targets, window, absent=-1),
            negatives=negatives,
            scale=self._scale,
        )
        return loss, losses, accuracies

    @property
    def _scale(self) -> float:
        return 1.0 if self.score == "dot" else 1 / self.encoding_channels

    def _contrast(self, predictions: Tensor, step: int, keys: _Keys) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy of predictions [B, T_k, D] of a step."""
        queries, targets = predictions.flatten(0, 1), keys.targets[step]
        if keys.ring:
            losses, ranks = ring_info_nce(queries, keys.keys, targets.flatten(), scale=self._scale)
            count = max(ranks.shape[0], 1)
            return losses.sum() / count, (ranks == 0).sum().to(losses.dtype) / count
        groups = keys.groups
        if groups is not None:
            groups = groups[0][:, None].expand(targets.shape).flatten(), groups[1]
        loss, accuracy, _ = info_nce(
            queries,
            keys.keys,
            targets.flatten(),
            negatives=None if keys.negatives is None else keys.negatives[step].flatten(0, 1),
            scale=self._scale,
            groups=groups,
            contrast="all" if groups is None else "same",
        )
        return loss, accuracy

    def _log_contrasted(self, keys: _Keys, world: int, like: Tensor) -> float | Tensor:
        """Return the log of the number of contrasted keys, including the target, as a mean over predictions.

        like: see :func:`log_count`.
        """
        if keys.groups is None:
            ring = world if keys.ring else 1
            return log_count(keys.keys.shape[0] * ring if keys.negatives is None else self.neg_samples + 1, like)
        mine, every = keys.groups
        if keys.negatives is None:
            return (mine[:, None] == every).sum(1).clamp(min=1).log().mean()
        same = [(every[frames] == mine[:, None, None]).sum(2) + 1 for frames in keys.negatives]
        return torch.stack([count.log().mean() for count in same]).mean()

    def _windowed(self, encodings: Tensor, sequences: int | None = None) -> Windowed:
        frames = encodings.shape[2]
        window = frames if self.subsample is None else min(frames, self.subsample)
        counts = [window - (self.pred_steps if self.common_positions else step + 1) for step in range(self.pred_steps)]
        return Windowed(encodings.shape[0] if sequences is None else sequences, frames, window, counts)

    def _draw(self, device: torch.device, of: Windowed, generator: torch.Generator | None) -> SequenceNegatives:
        return draw(self.sampling, self.neg_samples, of, device, generator, without_positive=self.exclude_positive)

    def _drawn(
        self,
        candidates: Tensor,
        of: Windowed,
        generator: torch.Generator | None,
        negatives: SequenceNegatives | Tensor | Sequence[Tensor] | None,
    ) -> SequenceNegatives:
        """Return the given draws, checked, or new ones."""
        if negatives is None:
            return self._draw(candidates.device, of, generator)
        given = negatives if isinstance(negatives, SequenceNegatives) else SequenceNegatives(negatives)
        return checked_draws(given, self.sampling, self.neg_samples, of)

    def _check_settings(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("encoding_channels", "context_channels", "pred_steps", "neg_samples"):
            check_integer(name, getattr(self, name), 1)
        check_integer("window", self.window, self.pred_steps + 1)
        if self.subsample is not None:
            check_integer("subsample", self.subsample, self.pred_steps + 1)
        if self.exclude_positive and self.sampling != "shifted":
            raise ValueError(f'exclude_positive is for sampling="shifted", got {self.sampling!r}')
        if self.gather_negatives == "ring" and (self.sampling != "all" or self.same_speaker):
            raise ValueError('gather_negatives="ring" needs sampling="all" and no same_speaker')

    def _check(self, encodings: Tensor, contexts: Tensor, speakers: Tensor | None) -> None:
        for name, value, channels in (
            ("encodings", encodings, self.encoding_channels),
            ("contexts", contexts, self.context_channels),
        ):
            check_floating(name, value)
            if value.ndim != 3 or value.shape[1] != channels:
                raise ValueError(f"{name} must be [B, {channels} channels, L], got shape {tuple(value.shape)}")
        if encodings.shape[0] != contexts.shape[0] or encodings.shape[2] != contexts.shape[2]:
            raise ValueError(
                f"contexts must have the batch and length of encodings {tuple(encodings.shape)}, "
                f"got {tuple(contexts.shape)}"
            )
        if encodings.shape[2] <= self.pred_steps:
            raise ValueError(
                f"a sequence of {encodings.shape[2]} frames is too short to predict pred_steps={self.pred_steps} "
                f"ahead: it needs more than {self.pred_steps}"
            )
        if (speakers is not None) != self.same_speaker:
            raise ValueError(
                "same_speaker needs speakers" if self.same_speaker else "speakers are for same_speaker=True alone"
            )
        if speakers is None:
            return
        if check_dense("speakers", speakers).dtype not in INTEGERS:
            raise TypeError(f"speakers must be integers, got {speakers.dtype}")
        if speakers.shape != encodings.shape[:1]:
            raise ValueError(f"speakers must be integers [{encodings.shape[0]}], got shape {tuple(speakers.shape)}")
