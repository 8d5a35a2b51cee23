"""Contrastive predictive coding of images and sound: the loss of predicting encodings some rows or frames ahead.

An encoder turns patches into a grid of encodings, a context network summarises the rows seen so far, and InfoNCE scores
predictions of the encodings some rows further. Other directions are predicted in the turned grid. Sound is a sequence
of encodings, which has one direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.models.out_channels import out_channels
from cpc_ext.nn.grid_info_nce import GridInfoNCE, GridInfoNCEOutput, turned_grids
from cpc_ext.nn.sequence_info_nce import SequenceInfoNCE
from cpc_ext.nn.target_info_nce import TargetInfoNCE

__all__ = ["CPC"]


class CPC(EncoderModel):
    """Contrastive predictive coding, version 1 or 2 depending on context network and objective.

    CPC v1 (van den Oord et al. 2018, arXiv 1807.03748, section 3.3) predicts encodings by one matrix per step. CPC v2
    (Hénaff et al. 2019, arXiv 1905.09272) has a :class:`ResidualContext` for each direction and predicts projected
    encodings, :class:`cpc_ext.nn.TargetInfoNCE`.

    Direction d predicts downwards in the grid of encodings turned clockwise by 90° d times: down, right, up and left
    in the image. All directions share the encoder; each has predictions of its own.

    With a :class:`cpc_ext.nn.SequenceInfoNCE` it is CPC on speech (section 3.1): encodings are [B, D, L], contexts
    [B, E, L], and nothing is turned.

    Args:
        encoder: patches or images → encodings [B, D, rows, cols], or sound → [B, D, L], with an attribute
            ``out_channels`` = D.
        context: encodings [B, D, rows, cols] → contexts [B, E, rows, cols] that see no row below their own, with an
            attribute ``out_channels`` = E; or [B, D, L] → [B, E, L]. One network that all directions share, or one for
            each direction.
        objective: a :class:`cpc_ext.nn.GridInfoNCE`, :class:`cpc_ext.nn.TargetInfoNCE` or, for sequences,
            :class:`cpc_ext.nn.SequenceInfoNCE` for D and E. Default: a GridInfoNCE with the settings.
        settings: keyword arguments of that GridInfoNCE: ``pred_steps``, which must be given, ``pred_directions``,
            ``skip``, ``neg_samples``, ``gather_negatives``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, or arguments that do not fit each other.
    """

    def __init__(
        self,
        encoder: nn.Module,
        context: nn.Module | Sequence[nn.Module],
        objective: GridInfoNCE | TargetInfoNCE | SequenceInfoNCE | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(context, nn.Module) and not isinstance(context, nn.ModuleList):
            shared, contexts = True, [context]
        else:
            shared, contexts = False, list(context)
        if objective is not None and settings:
            raise TypeError(f"give either objective or the settings of a GridInfoNCE, got both: {', '.join(settings)}")
        if not contexts:
            raise ValueError("context must be a network, or one for each direction, got none")
        if objective is None:
            objective = GridInfoNCE(out_channels(encoder), out_channels(contexts[0]), **settings)
        directions = 1 if isinstance(objective, SequenceInfoNCE) else objective.pred_directions
        if not 1 <= directions <= 4:
            raise ValueError(f"pred_directions must be 1 to 4, got {directions}")
        if not shared and len(contexts) != directions:
            raise ValueError(
                f"context must be one network, or one for each of {directions} directions, got {len(contexts)}"
            )
        # A sequence has one direction, and no dimension for it.
        shared = shared or isinstance(objective, SequenceInfoNCE)
        self.encoder = encoder
        self.context = contexts[0] if shared else nn.ModuleList(contexts)
        self.objective = objective

    def forward(self, inputs: Tensor, **draws: Any) -> GridInfoNCEOutput:
        """Return the loss of a batch.

        Args:
            inputs: patches [B, rows, cols, C, p, p], images [B, C, H, W] or sound [B, 1, T]: what the encoder takes.
            draws: ``generator`` or ``negatives`` of an objective that samples; see :class:`cpc_ext.nn.GridInfoNCE`;
                ``speakers`` of :class:`cpc_ext.nn.SequenceInfoNCE`.

        Raises:
            ValueError: a grid with too few rows, or a sequence of too few frames, for the steps ahead; a grid that is
                not square although there is more than one direction.
        """
        encodings = self._turned(self.encode(inputs))
        return self.objective(encodings, self._contexts(encodings), **draws)

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the encodings z, [B, D, rows, cols], or [B, D, L] for sound."""
        encodings: Tensor = self.encoder(inputs)
        return encodings

    def contextualize(self, encodings: Tensor) -> Tensor:
        """Return contexts c of encodings [B, D, rows, cols], in each direction's turned grid.

        Their shape is [directions, B, E, rows, cols]; for sequences, [B, D, L] → [B, E, L].
        """
        return self._contexts(self._turned(encodings))

    def _turned(self, encodings: Tensor) -> Tensor:
        """Return the grids to predict in, [B, D, rows, cols] → [directions, B, D, rows, cols]; sequences unchanged."""
        if isinstance(self.objective, SequenceInfoNCE):
            return encodings
        return turned_grids(encodings, self.objective.pred_directions)

    def _contexts(self, grids: Tensor) -> Tensor:
        if isinstance(self.objective, SequenceInfoNCE):
            contexts: Tensor = self.context(grids)
            return contexts
        if isinstance(self.context, nn.ModuleList):
            return torch.stack([context(grid) for context, grid in zip(self.context, grids, strict=True)])
        return torch.unflatten(self.context(grids.flatten(0, 1)), 0, grids.shape[:2])
