"""Recurrent contexts: against PyTorch's own layers, with kept states, without gradients through time, and backwards."""

import copy

import pytest
import torch
from torch import nn

from cpc_ext.models import CausalTransformerContext, RecurrentContext

EXACT = {"atol": 1e-12, "rtol": 0}
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


def encodings(frames=7, channels=5, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, frames, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_pytorchs_layers(kind, layers):
    context = RecurrentContext(5, 4, kind=kind, layers=layers).double()
    theirs = KINDS[kind](5, 4, layers, batch_first=True).double()
    for layer, network in enumerate(context.layers):
        for name, value in network.state_dict().items():
            theirs.state_dict()[name.replace("_l0", f"_l{layer}")].copy_(value)
    z = encodings()
    expected = theirs(z.transpose(1, 2))[0].transpose(1, 2)
    torch.testing.assert_close(context(z), expected, **EXACT)
    assert context.out_channels == 4
    torch.testing.assert_close(context(z, layer=layers), expected, **EXACT)
    torch.testing.assert_close(context(z), expected, **EXACT)
    if layers > 1:
        assert context(z, layer=1).shape == (3, 4, 7)
        first = KINDS[kind](5, 4, batch_first=True).double()
        first.load_state_dict(context.layers[0].state_dict())
        torch.testing.assert_close(context(z, layer=1), first(z.transpose(1, 2))[0].transpose(1, 2), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_state_goes_on_where_the_window_ended(kind):
    context = RecurrentContext(5, 4, kind=kind, layers=2, keep_state=True).double()
    z = encodings()
    whole = context(z)
    context.reset_state()
    begin = context(z[..., :3])
    # A layer asked for in between leaves the states of all where they would be.
    middle = context(z[..., 3:5], layer=1)
    end = context(z[..., 5:])
    torch.testing.assert_close(torch.cat([begin, end], 2), torch.cat([whole[..., :3], whole[..., 5:]], 2), **EXACT)
    assert middle.shape == (3, 4, 2)
    # States have no gradient to the windows before.
    first, second = (z[..., part].clone().requires_grad_() for part in (slice(3), slice(3, 7)))
    context.reset_state()
    context(first)
    assert torch.autograd.grad(context(second).sum(), (first, second), allow_unused=True)[0] is None
    with pytest.raises(ValueError, match=r"kept state is of 3 sequences, but there are 2; reset_state\(\)"):
        context(z[:2])
    context.reset_state()
    assert context(z[:2]).shape == (2, 4, 7)
    context.keep_state = False
    torch.testing.assert_close(context(z), whole, **EXACT)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_the_kept_state_goes_where_the_parameters_go(kind):
    torch.manual_seed(0)
    context = RecurrentContext(5, 4, kind=kind, layers=2, keep_state=True)
    encodings = torch.randn(3, 5, 6)
    context(encodings)
    kept = copy.deepcopy(context.state)
    context.double()
    found = context(encodings.double())
    context.state = kept
    expected = context.float()(encodings)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("options", [{}, {"kind": "lstm", "layers": 2}, {"remove_bptt": True}])
def test_a_state_of_inference_mode_is_trained_from(options):
    context = RecurrentContext(5, 4, keep_state=True, **options).double()
    gradients = []
    for mode in (torch.no_grad, torch.inference_mode):
        context.reset_state()
        context.zero_grad()
        with mode():
            context(encodings())
        context(encodings()).square().sum().backward()
        gradients.append([parameter.grad for parameter in context.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_without_keeping_every_window_begins_with_zeros():
    context = RecurrentContext(5, 4).double()
    z = encodings()
    assert torch.equal(context(z), context(z))
    assert context.state is None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_no_gradient_through_time(layers, keep):
    context = RecurrentContext(5, 4, layers=layers, keep_state=keep, remove_bptt=True).double()
    z = encodings().requires_grad_()
    cells = [nn.GRUCell(*network.weight_ih_l0.shape[::-1][:1], 4).double() for network in context.layers]
    for cell, network in zip(cells, context.layers, strict=True):
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in network.state_dict().items()})
    sequence = [z[..., frame] for frame in range(7)]
    for cell in cells:
        state = torch.zeros(3, 4, dtype=torch.float64)
        for frame, given in enumerate(sequence):
            state = cell(given, state.detach())
            sequence[frame] = state
    expected = torch.stack(sequence, 2)
    weight = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = torch.cat([context(z[..., :3]), context(z[..., 3:])], 2) if keep else context(z)
    torch.testing.assert_close(made, expected, **EXACT)
    ours = torch.autograd.grad((made * weight).sum(), [z, *context.parameters()])
    theirs = torch.autograd.grad((expected * weight).sum(), [z, *[one for cell in cells for one in cell.parameters()]])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: RecurrentContext(8, 8, **options),
        lambda **options: RecurrentContext(8, 8, remove_bptt=True, **options),
        lambda **options: CausalTransformerContext(8, 7, hidden=5, **options),
        lambda **options: CausalTransformerContext(8, hidden=5, absolute=True, **options),
    ],
)
def test_backwards(make):
    forwards, backwards = make().double().eval(), make(reverse=True).double().eval()
    backwards.load_state_dict(forwards.state_dict())
    z = encodings(channels=8)
    torch.testing.assert_close(backwards(z), forwards(z.flip(2)).flip(2), **EXACT)
    assert not torch.equal(backwards(z), forwards(z))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"kind": "mlp"}, "kind must be one of gru, lstm, rnn"),
        ({"kind": "lstm", "remove_bptt": True}, 'remove_bptt is for kind="gru"'),
    ],
)
def test_wrong_settings(options, problem):
    with pytest.raises(ValueError, match=problem):
        RecurrentContext(**{"channels": 5, **options})


def test_wrong_input():
    context = RecurrentContext(5, 4, layers=2)
    with pytest.raises(ValueError, match=r"encodings must be \[B, 5, L\], got shape \(3, 4, 7\)"):
        context(torch.zeros(3, 4, 7))
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"layer must be 1 to 2, got {layer}"):
            context(torch.zeros(3, 5, 7), layer=layer)
