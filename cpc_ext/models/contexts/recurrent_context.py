"""Recurrent context networks for sequences: encodings [B, D, L] to contexts [B, E, L], which summarise the past."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpc_ext.nn.typed import Module, ModuleList

__all__ = ["RecurrentContext"]

_KINDS: dict[str, Callable[..., nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}

# A layer's state, [1, B, E]; an LSTM has two.
State = Tensor | tuple[Tensor, Tensor]


class RecurrentContext(Module):
    """Context network of CPC on speech (van den Oord et al. 2018, arXiv 1807.03748, section 3.1).

    Parameters start as those of PyTorch's layers.

    Args:
        channels: D.
        hidden: E.
        kind: "gru", "lstm" or "rnn".
        layers: number of layers.
        keep_state: whether a call begins with the detached final state of the call before, for windows that follow one
            another. The first call begins with zeros, as does every call without ``keep_state``.
        remove_bptt: whether to stop the gradient from going back in time, an option of Greedy InfoMax: each step's
            incoming state is taken as a constant. For "gru" only.
        reverse: whether to run backwards in time, so that a context summarises what comes after.

    Attributes:
        out_channels: E.
        state: kept state of each layer, [1, B, E] or an LSTM's pair of these; None before the first call. It is not in
            the state dict, and may be assigned.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 256,
        *,
        kind: str = "gru",
        layers: int = 1,
        keep_state: bool = False,
        remove_bptt: bool = False,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
        if remove_bptt and kind != "gru":
            raise ValueError(f'remove_bptt is for kind="gru", got {kind!r}')
        self.channels = channels
        self.out_channels = hidden
        self.kind = kind
        self.keep_state = keep_state
        self.remove_bptt = remove_bptt
        self.reverse = reverse
        self.state: list[State] | None = None
        # Separate layers, so that each one's output is available.
        self.layers = ModuleList(
            _KINDS[kind](hidden if layer else channels, hidden, batch_first=True) for layer in range(layers)
        )

    def forward(self, encodings: Tensor, *, layer: int | None = None) -> Tensor:
        """Return the contexts of sequences.

        Args:
            encodings: [B, D, L].
            layer: number of the layer whose output is returned, from 1. Default: the last.

        Returns:
            Contexts [B, E, L], with E last in memory.

        Raises:
            ValueError: encodings of another shape, no such layer, or a kept state of another number of sequences.
        """
        if encodings.ndim != 3 or encodings.shape[1] != self.channels:
            raise ValueError(f"encodings must be [B, {self.channels}, L], got shape {tuple(encodings.shape)}")
        if layer is not None and not 1 <= layer <= len(self.layers):
            raise ValueError(f"layer must be 1 to {len(self.layers)}, got {layer}")
        sequence = (encodings.flip(2) if self.reverse else encodings).transpose(1, 2)
        states: list[State] = []
        for index, network in enumerate(self.layers):
            sequence, state = self._run(network, sequence, self._kept(index, encodings.shape[0]))
            states.append(state)
            # With keep_state the layers above run as well, to update their states.
            if layer == index + 1:
                wanted = sequence
                if not self.keep_state:
                    break
        if self.keep_state:
            self.state = states
        contexts = (sequence if layer is None else wanted).transpose(1, 2)
        return contexts.flip(2) if self.reverse else contexts

    def reset_state(self) -> None:
        """Begin with zeros again."""
        self.state = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecurrentContext:
        """Convert the kept state together with the parameters, for ``to``, ``half`` and the like."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.state is not None:
            self.state = [_map(fn, each) for each in self.state]
        return self

    def extra_repr(self) -> str:
        return f"keep_state={self.keep_state}, remove_bptt={self.remove_bptt}, reverse={self.reverse}"

    def _kept(self, index: int, batch: int) -> State | None:
        if not self.keep_state or self.state is None:
            return None
        # A tensor that was made in inference mode can take part in a backward pass only as a copy.
        state = _map(lambda each: each.clone() if each.is_inference() else each, self.state[index])
        kept = (state if isinstance(state, Tensor) else state[0]).shape[1]
        if kept != batch:
            raise ValueError(
                f"the kept state is of {kept} sequences, but there are {batch}; reset_state() begins with zeros again"
            )
        return state

    def _run(self, network: nn.RNNBase, sequence: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Run a layer on a sequence [B, L, D] from a state; return its output and its final state."""
        if self.remove_bptt:
            with torch.no_grad():
                before, last = network(sequence, state)
                first = state.transpose(0, 1) if isinstance(state, Tensor) else torch.zeros_like(before[:, :1])
                before = torch.cat([first, before[:, :-1]], dim=1)
            # With all incoming states known, the steps run as one batch.
            weights = network.all_weights[0]
            after = torch.gru_cell(sequence.flatten(0, 1), before.flatten(0, 1), *weights)
            return torch.unflatten(after, 0, before.shape[:2]), last
        contexts, last = network(sequence, state)
        if isinstance(last, Tensor):
            return contexts, last.detach()
        return contexts, (last[0].detach(), last[1].detach())


def _map(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to a layer's state, or to both states of an LSTM."""
    return fn(state) if isinstance(state, Tensor) else (fn(state[0]), fn(state[1]))
