"""CPC and Greedy InfoMax on sound: each module's loss, gradients and context network."""

import pytest
import torch

from cpc_ext.models import (
    CPC,
    CausalTransformerContext,
    GreedyInfoMax,
    GreedySupervised,
    RecurrentContext,
    WaveformEncoder,
)
from cpc_ext.nn import GridInfoNCE, SequenceInfoNCE

WIDTHS = (4, 5, 6, 7, 8)


def make(modules=5, context=None, **options):
    torch.manual_seed(0)
    settings = {"pred_steps": 2, "neg_samples": 4, "objective": SequenceInfoNCE, **options}
    return GreedyInfoMax(WaveformEncoder(WIDTHS), modules, context=context, **settings).double()


@pytest.fixture
def waveforms():
    return torch.rand(2, 1, 1600, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def with_gradient(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("modules", [1, 2, 5, (1, 4)])
def test_modules_together_are_the_encoder(modules, waveforms):
    model = make(modules, RecurrentContext(8, 3))
    encodings = model.encodings_by_module(waveforms)
    assert [one.shape[1] for one in encodings] == [module.out_channels for module in model.encoder_modules]
    assert torch.equal(encodings[-1], model.encode(waveforms))
    parameters = [parameter for module in model.encoder_modules for parameter in module.parameters()]
    assert sorted(map(id, parameters)) == sorted(map(id, model.encoder.parameters()))
    assert model.contextualize(encodings[-1]).shape == (2, 3, 10)


def test_each_module_learns_by_its_own_loss(waveforms):
    model = make(context=RecurrentContext(8, 3), context_module=True)
    assert len(model.encoder_modules) == 6
    expected = [
        {f"encoder.layers.{index}.conv.{name}" for name in ("weight", "bias")} | {f"objectives.{index}.weight"}
        for index in range(5)
    ]
    expected.append({"objectives.5.weight", *(f"context.{name}" for name, _ in model.context.named_parameters())})
    for module, output in enumerate(model.outputs(waveforms, generator=generator())):
        model.zero_grad()
        output.loss.backward()
        assert with_gradient(model) == expected[module]
        assert output.step_losses.shape == (2,)


@pytest.mark.parametrize("context_module", [False, True])
def test_losses_are_the_objectives_of_encodings_and_contexts(context_module, waveforms):
    model = make(context=RecurrentContext(8, 3), context_module=context_module)
    drawn = generator()
    encodings = model.encodings_by_module(waveforms)
    for index, output in enumerate(model(waveforms, generator=generator())):
        contexts = encodings[index]
        if index == len(encodings) - 1:
            contexts = model.context(contexts)
            assert torch.equal(contexts, model.contextualize(encodings[index]))
        else:
            assert torch.equal(contexts, model.contextualize(encodings[index], index))
        # Each module has draws of its own.
        assert output.loss == model.objectives[index](encodings[index], contexts, generator=drawn).loss


def test_a_context_network_for_each_module(waveforms):
    model = make(context=[RecurrentContext(width, width + 1) for width in WIDTHS])
    encodings = model.encodings_by_module(waveforms)
    for index, output in enumerate(model.outputs(waveforms, generator=generator())):
        model.zero_grad()
        output.loss.backward()
        assert f"context.{index}.layers.0.weight_hh_l0" in with_gradient(model)
        assert model.contextualize(encodings[index], index).shape[1] == WIDTHS[index] + 1
    model.freeze(2)
    for index, context in enumerate(model.context):
        assert {parameter.requires_grad for parameter in context.parameters()} == {index >= 2}
        assert context.training == (index >= 2)
    assert len(model(waveforms)) == 3
    model.eval()
    assert not any(context.training for context in model.context)


def test_draws_and_speakers_are_passed_on(waveforms):
    model = make(2, RecurrentContext(8, 3), same_speaker=True)
    speakers = torch.tensor([3, 5])
    draws = [
        model.draw_negatives(index, encodings, generator(index))
        for index, encodings in enumerate(model.encodings_by_module(waveforms))
    ]
    outputs = model(waveforms, negatives=draws, speakers=speakers)
    for index, encodings in enumerate(model.encodings_by_module(waveforms)):
        assert outputs[index].loss == model.loss(index, encodings, negatives=draws[index], speakers=speakers).loss
    with pytest.raises(ValueError, match="needs speakers"):
        model(waveforms)


def test_cpc_takes_sequences(waveforms):
    encoder, context = WaveformEncoder(8).double(), CausalTransformerContext(8, 10, hidden=5).double().eval()
    model = CPC(encoder, context, SequenceInfoNCE(8, pred_steps=2, neg_samples=4).double())
    encodings = model.encode(waveforms)
    assert encodings.shape == (2, 8, 10)
    assert torch.equal(model.contextualize(encodings), context(encodings))
    expected = model.objective(encodings, context(encodings), generator=generator())
    assert model(waveforms, generator=generator()).loss == expected.loss
    assert CPC(encoder, [context], model.objective)(waveforms, generator=generator()).loss == expected.loss
    with pytest.raises(ValueError, match="one for each of 1 directions, got 2"):
        CPC(encoder, [context, context], model.objective)


def test_one_module_is_cpc(waveforms):
    context = RecurrentContext(8, 3).double()
    model = make(1, context)
    cpc = CPC(model.encoder, context, model.objectives[0])
    assert cpc(waveforms, generator=generator()).loss == model(waveforms, generator=generator())[0].loss


def test_supervised_modules_classify_means_over_time(waveforms):
    model = GreedySupervised(WaveformEncoder(WIDTHS), 5, classes=3).double()
    labels = torch.tensor([2, 0])
    encodings = model.encodings_by_module(waveforms)
    for index, output in enumerate(model(waveforms, labels)):
        logits = model.objectives[index](encodings[index].mean(2))
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, labels))
        assert output.accuracy == (logits.argmax(1) == labels).double().mean()


def test_wrong_settings():
    with pytest.raises(ValueError, match="context_module needs one context network"):
        make(context_module=True)
    with pytest.raises(ValueError, match="context_module needs one context network"):
        make(1, [RecurrentContext(8, 3)], context_module=True)
    with pytest.raises(ValueError, match="one for each of 5 modules, got 2"):
        make(context=[RecurrentContext(8, 3)] * 2)
    with pytest.raises(TypeError, match="pred_step"):
        make(objective=GridInfoNCE, pred_step=3)
