"""Contrastive batches too large for one backward pass through an encoder (Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs the embeddings of the whole batch, but not their graph: once the gradients of the embeddings
are known, each chunk of the batch can be encoded again and differentiated separately.
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
    """Compute the loss of a batch and its gradients, differentiating the encoders one chunk at a time.

    Gradients are added to ``.grad``. The call replaces ``loss_fn(*(encoder(x) for encoder, x in zip(encoders,
    inputs))).backward()``, and gives the same gradients::

        loss = grad_cache(loss_fn, (image_encoder, text_encoder), (images, tokens), chunk_size=64)
        optimizer.step()

    The whole batch is first encoded in chunks without a graph, and the loss is differentiated in the embeddings. Then
    each chunk is encoded again, with a graph, and differentiated. Only the activations of one chunk are in memory, at
    the cost of a second forward pass. The second pass repeats the random numbers of the first, so that dropout is the
    same. Encoders in which the samples of a batch interact give other results: batch norm takes its statistics over a
    chunk, and updates its running ones twice.

    Autocast may be on; it is off while gradients are formed. An encoder with ``no_sync``, such as
    ``DistributedDataParallel``, averages gradients only with its last chunk, and ``loss_fn`` may gather embeddings.
    Parameters of the loss alone, such as a temperature, must not be among those that the encoder averages.

    Args:
        loss_fn: takes the embeddings of the whole batch from each encoder, and returns a scalar.
        encoders: one encoder, or one for each of the inputs, which may be the same. An encoder takes a chunk of its
            input, a tuple as several arguments and a mapping as keyword arguments, and returns [chunk, ...].
        inputs: the input of a single encoder, else one for each: a tensor [B, ...], or a tuple or mapping of such;
            other values are passed with every chunk.
        chunk_size: largest number of samples in a chunk.
        scaler: multiplies the loss before gradients are formed, as in ``scaler.scale(loss).backward()``.

    Returns:
        The loss, without a graph and not scaled.

    Raises:
        TypeError: a chunk_size that is not an int.
        ValueError: a chunk_size below 1, different numbers of encoders and inputs, or an input without a tensor or with
            tensors of different lengths.
    """
    check_integer("chunk_size", chunk_size, 1)
    if isinstance(encoders, nn.ModuleList):  # It is callable, but computes nothing.
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
    """States of random number generators: the CPU's, and those of devices of one kind."""

    cpu: Tensor
    kind: str
    devices: list[int]
    states: list[Tensor]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Return a context in which the generators repeat their numbers; afterwards their present state is restored."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.kind)
            yield


class _First(NamedTuple):
    """The embeddings of a chunk from the first pass, and the random state before it."""

    embedded: Tensor
    random: _Random


class _Work(NamedTuple):
    """A chunk to be encoded again, and the gradient of its embeddings."""

    encoder: Callable[..., Tensor]
    chunk: _Chunk
    random: _Random
    gradient: Tensor

    def differentiate(self, *, last: bool) -> None:
        """Encode and differentiate the chunk. last: whether the encoder may now average gradients over processes."""
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
