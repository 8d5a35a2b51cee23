"""Frozen modules of Greedy InfoMax: all of their layers, including the stem's, are in evaluation mode."""

import pytest
import torch

from cpc_ext.models import GreedyInfoMax, MobileNetV2Encoder, ResNetV2Encoder, WideResNetEncoder


def modes(module):
    return {layer.training for layer in module.modules()}


def encoder_of(name):
    if name == "mobilenetv2":
        return MobileNetV2Encoder(norm="batch", width=0.25)
    if name == "wide":
        return WideResNetEncoder(10, 1, norm="batch")
    return ResNetV2Encoder(
        blocks=(1, 1, 1), channels=(8, 8, 8), stem_channels=8, stem=name, norm="batch", patch_size=16
    )


@pytest.mark.parametrize("name", ["imagenet", "cifar", "wide", "mobilenetv2"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_layers_are_in_evaluation_mode(name, frozen):
    model = GreedyInfoMax(encoder_of(name), 3, pred_steps=2)
    model.freeze(frozen)
    for mode in (False, True):
        model.train(mode)
        stem = [getattr(model.encoder, layer) for layer in model.encoder.stem_layers]
        for index, module in enumerate(model.encoder_modules):
            expected = mode and index >= frozen
            assert modes(module.blocks) == {expected}
            assert {p.requires_grad for p in module.parameters()} == {index >= frozen}
        assert set().union(*map(modes, stem)) == {mode and frozen == 0}


def test_a_frozen_stem_keeps_its_statistics():
    model = GreedyInfoMax(encoder_of("imagenet"), 3, pred_steps=2, neg_samples=4)
    model.freeze(1)
    model.train()
    before = model.encoder.norm1.running_mean.clone()
    model(torch.rand(2, 3, 40, 40))
    assert torch.equal(model.encoder.norm1.running_mean, before)
    assert model.encoder.norm1.num_batches_tracked == 0


def test_layers_that_replace_the_stems_are_frozen_as_well():
    """As synchronised batch norm replaces them after the encoder was cut."""
    model = GreedyInfoMax(encoder_of("imagenet"), 3, pred_steps=2)
    model.encoder.norm1 = torch.nn.BatchNorm2d(8)
    model.freeze(1)
    model.train()
    assert not model.encoder.norm1.training
    model.freeze(0)
    model.train()
    assert model.encoder.norm1.training
