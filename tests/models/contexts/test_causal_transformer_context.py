"""CPC_audio's transformer: against its formula, position by position, and for windows of other lengths."""

import math

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.models import CausalTransformerContext
from cpc_ext.models.contexts.causal_transformer_context import absolute_positions
from cpc_ext.nn import CausalTransformerLayer

EXACT = {"atol": 1e-12, "rtol": 0}


def encodings(frames, batch=2):
    return torch.randn(batch, 16, frames, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_definition(layer, x):
    """A layer of 4 heads of 4 channels on one sequence [L, 16], from loops over heads and positions."""
    query, key, value = (linear(x).view(-1, 4, 4) for linear in (layer.query, layer.key, layer.value))
    attended = torch.zeros(len(x), 4, 4, dtype=x.dtype)
    for head in range(4):
        for i in range(len(x)):
            scores = []
            for j in range(i + 1):
                distance = 0 if layer.relative is None else layer.relative[i - j]
                scores.append(query[i, head] @ (key[j, head] + distance) / math.sqrt(4))
            weights = torch.softmax(torch.stack(scores), 0)
            attended[i, head] = sum(weight * value[j, head] for j, weight in enumerate(weights))
    y = F.layer_norm(
        x + layer.output(attended.flatten(1)), (16,), layer.attention_norm.weight, layer.attention_norm.bias
    )
    return F.layer_norm(y + layer.contract(F.relu(layer.expand(y))), (16,), layer.norm.weight, layer.norm.bias)


def make(absolute=False, window=6, **options):
    torch.manual_seed(0)
    context = CausalTransformerContext(16, window, heads=4, hidden=7, absolute=absolute, **options).double()
    for parameter in context.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    return context


@pytest.mark.parametrize("frames", [1, 4, 6])
@pytest.mark.parametrize("absolute", [False, True])
def test_equals_definition(absolute, frames):
    context = make(absolute, layers=2).eval()
    z = encodings(frames)
    sequence = z.transpose(1, 2)
    if absolute:
        table = [
            [
                (math.sin if channel % 2 == 0 else math.cos)(position / 10000 ** ((channel - channel % 2) / 16))
                for channel in range(16)
            ]
            for position in range(frames)
        ]
        torch.testing.assert_close(absolute_positions(frames, 16), torch.tensor(table, dtype=torch.float64), **EXACT)
        sequence = sequence + torch.tensor(table, dtype=torch.float64)
    first = torch.stack([by_definition(context.layers[0], one) for one in sequence])
    torch.testing.assert_close(context(z, layer=1), first.transpose(1, 2), **EXACT)
    second = torch.stack([by_definition(context.layers[1], one) for one in first])
    torch.testing.assert_close(context(z), second.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_shorter_window_has_the_contexts_of_a_longer_ones_beginning(absolute):
    context = make(absolute).eval()
    z = encodings(6)
    torch.testing.assert_close(context(z[..., :4]), context(z)[..., :4], **EXACT)


def test_longer_windows_than_there_are_distances():
    with pytest.raises(ValueError, match="a sequence of 7 is longer than the 6 positions"):
        make()(encodings(7))
    assert make(True)(encodings(7)).shape == (2, 16, 7)


@pytest.mark.parametrize("absolute", [False, True])
def test_dropout_of_attention_and_of_what_is_hidden(absolute):
    z = encodings(6)
    context = make(absolute, dropout=0.5)
    made = [context(z) for _ in range(2)]
    assert not torch.equal(*made)
    plain = context.eval()(z)
    assert torch.equal(context(z), plain)
    without = make(absolute, dropout=0.0)
    assert torch.equal(without(z), without.eval()(z))
    torch.testing.assert_close(without(z), plain, **EXACT)


@pytest.mark.parametrize("absolute", [False, True])
def test_nothing_is_made_on_another_device(absolute):
    assert make(absolute).to("meta")(encodings(4).to("meta")).device.type == "meta"


def test_starts():
    layer = CausalTransformerLayer(64, 500, hidden=3)
    bound = 8**-0.5
    assert layer.relative.shape == (500, 8)
    assert 0.99 * bound < layer.relative.abs().max() <= bound
    assert layer.query.bias is None
    assert CausalTransformerLayer(64, None).expand.weight.shape == (2048, 64)


def test_wrong_arguments():
    for options, problem in (
        ({"heads": 3}, "channels must be a multiple of heads, 3, got 16"),
        ({"channels": 0}, "^channels must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=problem):
            CausalTransformerContext(**{"channels": 16, **options})
    with pytest.raises(ValueError, match="positions must be at least 1"):
        CausalTransformerLayer(16, 0)
    with pytest.raises(ValueError, match=r"encodings must be \[B, 16, L\]"):
        make()(torch.zeros(2, 15, 4))
    with pytest.raises(ValueError, match="layer must be 1 to 1, got 2"):
        make()(encodings(3), layer=2)
