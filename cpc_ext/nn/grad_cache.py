"""Contrastive batches larger than what an encoder can be differentiated on at once (Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs the embeddings of the whole batch, but not their graph: with the gradients of the embeddings
known, each chunk of the batch can be encoded anew and differentiated by itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from cpc_ext.ops._checks import check_integer
from cpc_ext.ops._library import without_autocast

__all__ = ["grad_cache"]


def grad_cache(
    loss_fn: Callable[..., Tensor],
    encoders: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] | nn.ModuleList,
    inputs: Any,
    chunk_size: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """The loss of a batch whose encoders are differentiated a chunk at a time; gradients are added to ``.grad``.

    In place of ``loss_fn(*(encoder(x) for encoder, x in zip(encoders, inputs))).backward()``, and with its gradients::

        loss = grad_cache(loss_fn, (image_encoder, text_encoder), (images, tokens), chunk_size=64)
        optimizer.step()

    All of the batch is encoded in chunks without a graph, the loss is differentiated in the embeddings, and each chunk
    is encoded once more, with a graph, and differentiated. Activations are those of a chunk, for the time of a second
    forward pass. The random numbers of the first pass come again in the second, so that dropout is the same. Encoders
    in which samples of a batch meet are another matter: batch norm takes its statistics over a chunk, and updates its
    running ones twice.

    Autocast may be on; it is off while gradients are formed. An encoder with ``no_sync``, such as
    ``DistributedDataParallel``, waits for its last chunk until it averages gradients, and ``loss_fn`` may gather
    embeddings. Parameters that only the loss has, such as a temperature, must not be among those that it averages.

    Args:
        loss_fn: takes what each encoder gives for the whole batch, gives a scalar.
        encoders: one, or one for each of the inputs; the same may be there twice. It takes a chunk of its input, as
            several arguments where that is a tuple, by name where it is a mapping, and gives [chunk, ...].
        inputs: of a single encoder its input, else one for each: a tensor [B, ...], or a tuple or mapping of such; what
            is no tensor goes to every chunk.
        chunk_size: samples of a chunk, at most.
        scaler: multiplies the loss before gradients are formed, as in ``scaler.scale(loss).backward()``.

    Returns:
        The loss, without a graph and not scaled.

    Raises:
        TypeError: a chunk_size that is no int.
        ValueError: a chunk_size below 1, other numbers of encoders and inputs, or an input without a tensor or with
            tensors of different lengths.
    """
    check_integer("chunk_size", chunk_size, 1)
    if isinstance(encoders, nn.ModuleList):  # Which is callable, though it computes nothing.
        encoders = [*encoders]
    elif callable(encoders):
        encoders, inputs = [encoders], [inputs]
    if len(encoders) != len(inputs):
        raise ValueError(f"encoders and inputs must be as many, got {len(encoders)} and {len(inputs)}")
    batches = [_chunks(value, chunk_size) for value in inputs]
    with torch.no_grad():
        firsts = [[_encode(encoder, one) for one in batch] for encoder, batch in zip(encoders, batches, strict=True)]
    embeddings = [torch.cat([first.embedded for first in of_input]).requires_grad_() for of_input in firsts]
    loss = loss_fn(*embeddings)
    _backward(loss if scaler is None else scaler.scale(loss))
    work = [
        _Work(encoder, chunk, first.random, gradient)
        for encoder, batch, of_input, embedded in zip(encoders, batches, firsts, embeddings, strict=True)
        if embedded.grad is not None
        for chunk, first, gradient in zip(
            batch, of_input, embedded.grad.split([len(first.embedded) for first in of_input]), strict=True
        )
    ]
    last = {id(one.encoder): place for place, one in enumerate(work)}
    for place, one in enumerate(work):
        one.differentiate(last=last[id(one.encoder)] == place)
    return loss.detach()


class _Chunk(NamedTuple):
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class _Random(NamedTuple):
    """Where random number generators were: the CPU's, and those of devices of one kind."""

    cpu: Tensor
    kind: str
    devices: list[int]
    states: list[Tensor]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """A context in which the generators give the same numbers once more, after which they go on as they were."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.kind)
            yield


class _First(NamedTuple):
    """What a chunk was encoded as the first time, and with which random numbers."""

    embedded: Tensor
    random: _Random


class _Work(NamedTuple):
    """A chunk to be encoded again, and the gradient of what it is encoded as."""

    encoder: Callable[..., Tensor]
    chunk: _Chunk
    random: _Random
    gradient: Tensor

    def differentiate(self, *, last: bool) -> None:
        """last: whether the encoder, if it averages gradients of processes, does so now."""
        no_sync = contextlib.nullcontext if last else getattr(self.encoder, "no_sync", contextlib.nullcontext)
        with no_sync():
            with self.random.again():
                embedded = self.encoder(*self.chunk.arguments, **self.chunk.named)
            if embedded.requires_grad:
                _backward(embedded, self.gradient)


def _encode(encoder: Callable[..., Tensor], chunk: _Chunk) -> _First:
    places = [*chunk.arguments, *chunk.named.values()]
    if isinstance(encoder, nn.Module):
        places.extend(itertools.islice(encoder.parameters(), 1))
    places = [place for place in places if isinstance(place, Tensor) and place.device.type not in ("cpu", "meta")]
    devices, states = get_device_states(*places[:1])
    random = _Random(torch.get_rng_state(), places[0].device.type if places else "cuda", devices, states)
    return _First(encoder(*chunk.arguments, **chunk.named), random)


def _chunks(value: Any, size: int) -> list[_Chunk]:
    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(value, Mapping):
        named = dict(value)
    else:
        arguments = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    lengths = {len(x) for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.ndim}
    if len(lengths) != 1:
        raise ValueError(f"an input's tensors must have one length, got {sorted(lengths) or 'no tensors'}")

    def part(x: Any, start: int) -> Any:
        return x[start : start + size] if isinstance(x, Tensor) and x.ndim else x

    return [
        _Chunk(tuple(part(x, start) for x in arguments), {name: part(x, start) for name, x in named.items()})
        for start in range(0, max(*lengths, 1), size)
    ]


def _backward(value: Tensor, gradient: Tensor | None = None) -> None:
    with without_autocast(value.device):
        torch.autograd.backward(value, gradient)
