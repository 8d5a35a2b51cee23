"""Gradients of encoders that are differentiated chunk by chunk equal those of the whole batch."""

import contextlib

import pytest
import torch
from torch import nn

from cpc_ext.nn import grad_cache
from cpc_ext.ops import info_nce

EXACT = {"atol": 1e-12, "rtol": 0}


def tower(seed, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).to(dtype)


def batch(seed=0, size=7, dtype=torch.float64):
    return torch.randn(size, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both_ways(first, second):
    return info_nce(first, second, scale=2.0, symmetric=True).loss


def gradients(*modules):
    """Return and clear the gradients of all parameters."""
    found = [parameter.grad for module in modules for parameter in module.parameters()]
    for module in modules:
        module.zero_grad()
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_two_encoders_with_dropout(size, shared):
    first = tower(0, dropout=0.4)
    second = first if shared else tower(1, dropout=0.4)
    inputs = batch(0), batch(1)
    torch.manual_seed(3)
    pairs = zip((first, second), inputs, strict=True)
    whole = both_ways(*(torch.cat([encoder(x) for x in input.split(size)]) for encoder, input in pairs))
    whole.backward()
    expected, after = gradients(first, second), torch.rand(3)
    torch.manual_seed(3)
    loss = grad_cache(both_ways, [first, second], inputs, size)
    torch.testing.assert_close(loss, whole.detach(), **EXACT)
    assert not loss.requires_grad
    for one, other in zip(gradients(first, second), expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, **EXACT)
    # Random numbers go on where the batch encoded once would have left them.
    assert torch.equal(torch.rand(3), after)


def test_gradients_of_the_loss_and_of_inputs_and_those_that_are_there():
    encoder, scale = tower(0), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    images = batch().requires_grad_()

    def loss_fn(embeddings):
        return info_nce(embeddings, embeddings.flip(0), scale=scale).loss

    wanted = torch.autograd.grad(loss_fn(encoder(images)), [images, scale, *encoder.parameters()])
    for times in (1, 2):
        grad_cache(loss_fn, encoder, images, 2)
        for parameter, one in zip([images, scale, *encoder.parameters()], wanted, strict=True):
            torch.testing.assert_close(parameter.grad, times * one, **EXACT)


def test_encoders_in_a_module_list():
    encoders = nn.ModuleList([tower(0), tower(1)])
    both_ways(*(encoder(batch(seed)) for seed, encoder in enumerate(encoders))).backward()
    expected = gradients(*encoders)
    grad_cache(both_ways, encoders, (batch(0), batch(1)), 3)
    for one, other in zip(gradients(*encoders), expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_inputs_of_several_tensors():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 4).double()

        def forward(self, x, mask=None, factor=1.0, *, shift=None):
            assert shift.ndim == 0
            return self.linear(x) * mask.unsqueeze(1) * factor + shift

    encoder, mask, shift = Encoder(), torch.rand(7).double(), torch.tensor(0.3).double()
    named = {"x": batch(1), "mask": mask, "shift": shift}
    both_ways(encoder(batch(), mask, 2.0, shift=shift), encoder(**named)).backward()
    expected = gradients(encoder)
    again = {"x": batch(), "mask": mask, "factor": 2.0, "shift": shift}
    grad_cache(both_ways, [encoder, encoder], [again, named], 3)
    torch.testing.assert_close(gradients(encoder), expected, **EXACT)
    listed = grad_cache(lambda x: x.square().sum(), lambda x, mask: encoder(x, mask, shift=shift), (batch(), mask), 3)
    torch.testing.assert_close(listed, encoder(batch(), mask, shift=shift).square().sum().detach(), **EXACT)


def test_no_more_than_a_chunk_has_a_graph():
    encoder, sizes = tower(0), []
    encoder.register_forward_hook(lambda _, inputs, output: sizes.append((len(inputs[0]), output.requires_grad)))
    grad_cache(lambda x: x.square().sum(), encoder, batch(), 3)
    assert sizes == [(3, False), (3, False), (1, False), (3, True), (3, True), (1, True)]


def test_what_needs_no_gradient_is_not_encoded_again():
    frozen, encoder = tower(0).requires_grad_(False), tower(1)
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    grad_cache(both_ways, [frozen, encoder], [batch(), batch(1)], 4)
    assert len(calls) == 4
    # Neither is an encoder whose embeddings the loss does not use.
    grad_cache(lambda first, second: first.sum() + encoder[0].weight.sum(), [tower(2), encoder], [batch(), batch()], 4)
    assert len(calls) == 6


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_and_a_scaler(scaled):
    """Weights that autocast rounds without a graph, in the first pass, must not be taken for those of the second."""
    encoder = tower(0, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None

    def loss_fn(embeddings):
        assert embeddings.dtype == torch.bfloat16
        assert embeddings.grad_fn is None
        return (embeddings.float() ** 2).mean()

    with torch.autocast("cpu", torch.bfloat16):
        whole = (encoder(batch(dtype=torch.float32)).float() ** 2).mean()
    whole.backward()
    expected = gradients(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        loss = grad_cache(loss_fn, encoder, batch(dtype=torch.float32), 3, scaler=scaler)
    torch.testing.assert_close(loss, whole.detach(), atol=1e-3, rtol=1e-2)
    for one, other in zip(gradients(encoder), expected, strict=True):
        torch.testing.assert_close(one, other * (8 if scaled else 1), atol=0.02, rtol=0.05)


def test_backward_is_not_under_autocast():
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradient

    encoder = tower(0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        grad_cache(lambda x: Seen.apply(x).sum(), lambda x: Seen.apply(encoder(x)), batch(dtype=torch.float32), 4)
    assert seen == [False] * 3


def test_processes_average_gradients_once_for_each_encoder():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.waiting, self.calls = tower(0), False, []

        @contextlib.contextmanager
        def no_sync(self):
            self.waiting = True
            yield
            self.waiting = False

        def forward(self, x):
            if torch.is_grad_enabled():
                self.calls.append(self.waiting)
            return self.inner(x)

    shared, single = Averaging(), Averaging()
    grad_cache(lambda x, y, z: (x * y * z).sum(), [shared, single, shared], [batch(seed) for seed in range(3)], 3)
    assert shared.calls == [True] * 5 + [False]
    assert single.calls == [True, True, False]


def test_wrong_arguments():
    encoder = tower(0)
    with pytest.raises(TypeError, match="chunk_size must be an int, got float"):
        grad_cache(both_ways, encoder, batch(), 2.5)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        grad_cache(both_ways, encoder, batch(), 0)
    with pytest.raises(ValueError, match="encoders and inputs must be as many, got 2 and 1"):
        grad_cache(both_ways, [encoder, encoder], [batch()], 2)
    with pytest.raises(ValueError, match=r"an input's tensors must have one length, got \[6, 7\]"):
        grad_cache(both_ways, encoder, (batch(), torch.zeros(6)), 2)
    for nothing in ({"factor": 2, "shift": torch.tensor(1.0)}, ()):
        with pytest.raises(ValueError, match="an input's tensors must have one length, got no tensors"):
            grad_cache(both_ways, encoder, nothing, 2)
