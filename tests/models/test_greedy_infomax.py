"""Greedy InfoMax: the division of an encoder, gradients that stop at boundaries, memory, and learning."""

import copy

import pytest
import torch

from cpc_ext.models import (
    CPC,
    GatedPixelCNNContext,
    GreedyInfoMax,
    GreedySupervised,
    MobileNetV2Encoder,
    ResNetV2Encoder,
    WideResNetEncoder,
)
from cpc_ext.models.greedy_infomax import module_starts, pooled, split_encoder
from cpc_ext.nn.grid_info_nce import turned_grids

BLOCKS = {"blocks": (1, 2, 1), "channels": (4, 6, 8), "stem_channels": 4, "stem": "cifar", "patch_size": 8}


def make_model(modules=3, **settings):
    torch.manual_seed(0)
    return GreedyInfoMax(ResNetV2Encoder(**BLOCKS), modules, **{"pred_steps": 2, "neg_samples": 4, **settings}).double()


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def generator():
    return torch.Generator().manual_seed(1)


def gradients_of(parameters):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]


def leaves_of(loss):
    """Return all parameters that the autograd graph of a loss reaches."""
    found, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found


@pytest.mark.parametrize(
    ("modules", "starts"), [(1, [0]), (2, [0, 3]), (3, [0, 1, 3]), ((2,), [0, 2]), ((1, 2, 3), [0, 1, 2, 3])]
)
def test_boundaries(modules, starts, images):
    encoder = ResNetV2Encoder(**BLOCKS).double()
    assert module_starts([1, 2, 1], modules) == starts
    parts = split_encoder(encoder, modules)
    assert len(parts) == len(starts)
    # Together the parts are the encoder: its parameters once each, and its encodings.
    parameters = [parameter for part in parts for parameter in part.parameters()]
    assert sorted(map(id, parameters)) == sorted(map(id, encoder.parameters()))
    model = GreedyInfoMax(encoder, modules, pred_steps=1).double()
    encodings = model.encodings_by_module(images)
    assert [part.shape[1] for part in encodings] == [part.out_channels for part in model.encoder_modules]
    torch.testing.assert_close(encodings[-1], encoder(images))


@pytest.mark.parametrize(
    "encoder",
    [
        WideResNetEncoder(10, 1, patch_size=8),
        MobileNetV2Encoder(width=0.25, patch_size=8),
        ResNetV2Encoder(blocks=(1, 1), channels=(4, 8), norm="layer", stem="imagenet", bottleneck=True, patch_size=8),
    ],
    ids=lambda encoder: type(encoder).__name__,
)
def test_other_encoders(encoder):
    model = GreedyInfoMax(encoder, 2, pred_steps=2)
    images = torch.rand(2, 3, 24, 24)
    owners = [{*m.parameters(), *o.parameters()} for m, o in zip(model.encoder_modules, model.objectives, strict=True)]
    assert set().union(*owners) == set(model.parameters())
    for own, output in zip(owners, model.outputs(images), strict=True):
        assert leaves_of(output.loss) == own
        output.loss.backward()
    torch.testing.assert_close(model.encodings_by_module(images)[-1], model.encode(images))


def test_gradients_stop_at_boundaries(images):
    model = make_model()
    outputs = model(images, generator=generator())
    for index, output in enumerate(outputs):
        model.zero_grad()
        output.loss.backward()
        for other, (module, objective) in enumerate(zip(model.encoder_modules, model.objectives, strict=True)):
            parameters = [*module.parameters(), *objective.parameters()]
            reached = [parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters]
            assert reached == [other == index] * len(parameters)


def test_graphs_hold_their_modules_alone(images):
    model = make_model()
    for index, output in enumerate(model(images, generator=generator())):
        own = {*model.encoder_modules[index].parameters(), *model.objectives[index].parameters()}
        assert leaves_of(output.loss) == own


def test_one_after_another_is_all_at_once(images):
    model = make_model()
    sum(output.loss for output in model(images, generator=generator())).backward()
    expected = gradients_of(model.parameters())
    model.zero_grad()
    for output in model.outputs(images, generator=generator()):
        output.loss.backward()
    for one, other in zip(gradients_of(model.parameters()), expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_activations_are_freed_before_the_next_module_runs(images):
    """What the autograd graph keeps while a module runs is that module's alone."""
    model = make_model()
    alive, at_start = set(), []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    for module in model.encoder_modules:
        module.register_forward_pre_hook(lambda *_: at_start.append(len(alive)))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        for output in model.outputs(images, generator=generator()):
            assert len(alive) > 0
            output.loss.backward()
    assert at_start == [0, 0, 0]


def test_modules_contrast_at_the_same_places(images):
    """The draws of a module do not depend on which other modules learn."""
    model = make_model()
    losses = [output.loss.item() for output in model(images, generator=generator())]
    for frozen in (1, 2):
        model.freeze(frozen)
        assert [output.loss.item() for output in model(images, generator=generator())] == losses[frozen:]


def test_frozen_modules_stay_as_they_are(images):
    model = GreedyInfoMax(ResNetV2Encoder(norm="batch", **BLOCKS), 3, pred_steps=2).double()
    before = copy.deepcopy(model.state_dict())
    model.freeze(2)
    model.train()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (output,) = model(images)
        output.loss.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # Running statistics of batch norm count as well.
    assert changed == {name for name in before if name.startswith(("encoder.layers.2.", "objectives.2."))}


def test_one_module_with_a_context_is_cpc(images):
    model = make_model(1, context=GatedPixelCNNContext(8, 2), pred_directions=2)
    reference = CPC(model.encoder, model.context, pred_steps=2, pred_directions=2, neg_samples=4).double()
    reference.objective.load_state_dict(model.objectives[0].state_dict())
    (output,) = model(images, generator=generator())
    torch.testing.assert_close(output, reference(images, generator=generator()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["none", "layer", "instance", "batch"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norms_behind_a_boundary(norm, channels_last):
    """Their input has no gradient, which takes another way through group norm."""
    torch.manual_seed(0)
    model = GreedyInfoMax(ResNetV2Encoder(norm=norm, **BLOCKS), 3, pred_steps=2, neg_samples="all").double()
    patches = torch.randn(2, 5, 5, 8, 8, 3, dtype=torch.float64).permute(0, 1, 2, 5, 3, 4)
    if channels_last:
        model.encoder.to(memory_format=torch.channels_last)
    features = patches.flatten(0, 2)
    for index, module in enumerate(model.encoder_modules):
        boundary = features.detach().requires_grad_()
        found = []
        for given in (features, boundary):
            model.zero_grad()
            made = module(given)
            features = made.detach()
            loss = model.loss(index, pooled(made, (2, 5, 5))).loss
            loss.backward()
            found.append([loss, *gradients_of(module.parameters())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("settings", [{"neg_samples": "all"}, {"pred_directions": 4}, {"skip": 0}])
def test_variants(settings, images):
    model = make_model((1, 2), **settings)
    for output in model.outputs(images):
        output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_module_learns():
    """To tell images by their colour, which all patches of one share."""
    model = make_model(neg_samples="all").float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = torch.rand(8, 3, 1, 1, generator=generator()).expand(-1, -1, 24, 24)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append([])
        for output in model.outputs(batch):
            output.loss.backward()
            losses[-1].append(output.loss.item())
        optimizer.step()
    assert all(last < 0.8 * first for first, last in zip(losses[0], losses[-1], strict=True)), (losses[0], losses[-1])


@pytest.mark.parametrize("modules", [1, 3])
def test_supervised(modules, images):
    labels = torch.tensor([0, 1, 1])
    model = GreedySupervised(ResNetV2Encoder(**BLOCKS), modules, classes=2).double()
    outputs = model(images, labels)
    assert len(outputs) == modules
    for index, output in enumerate(outputs):
        own = {*model.encoder_modules[index].parameters(), *model.objectives[index].parameters()}
        assert leaves_of(output.loss) == own
        assert 0 <= output.accuracy <= 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        for output in model.outputs(images, labels):
            output.loss.backward()
        optimizer.step()
    assert all(output.loss < 0.1 and output.accuracy == 1 for output in model(images, labels))


def test_the_supervised_loss_of_half_precision_is_not_rounded_to_it():
    model = GreedySupervised(ResNetV2Encoder(**BLOCKS), 1, classes=2).bfloat16()
    encodings = torch.randn(7, model.encoder.out_channels, 1, 1).bfloat16()
    labels = torch.arange(7) % 2
    loss = model.loss(0, encodings, labels=labels).loss
    logits = model.objectives[0](encodings.flatten(1)).float()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))


def test_empty_batch():
    model = make_model()
    assert [output.loss.item() for output in model(torch.zeros(0, 3, 24, 24).double())] == [0, 0, 0]
    supervised = GreedySupervised(ResNetV2Encoder(**BLOCKS), classes=2)
    outputs = supervised(torch.zeros(0, 3, 24, 24), torch.zeros(0, dtype=torch.int64))
    assert [output.loss.item() for output in outputs] == [0, 0, 0]


def test_delta_orthogonal_encoder_keeps_norms():
    """A linear encoder of one block per stack would keep the norm of every pixel's channels."""
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(blocks=(2, 2), channels=(8, 8), stem_channels=8)
    encoder.reset_parameters("delta-orthogonal")
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            taps = module.weight.flatten(2).abs().sum((0, 1))
            assert taps.nonzero().flatten().tolist() == [len(taps) // 2]
    assert 0.1 < encoder(torch.randn(1, 2, 2, 3, 8, 8)).std() < 10


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (0, "modules must be 1 to 3, the stacks of the encoder, got 0"),
        (4, "modules must be 1 to 3, the stacks of the encoder, got 4"),
        ((2, 2), r"modules must begin with rising blocks in 1..3, of 4, got \(2, 2\)"),
        ((4,), "modules must begin with rising blocks"),
    ],
)
def test_wrong_boundaries(modules, message):
    with pytest.raises(ValueError, match=message):
        make_model(modules)


def test_wrong_arguments(images):
    with pytest.raises(TypeError, match="modules must be an int"):
        make_model(True)
    with pytest.raises(ValueError, match="pred_directions must be 1 to 4, got 5"):
        make_model(pred_directions=5)
    with pytest.raises(ValueError, match="a grid of 5 rows is too small to predict pred_steps=5"):
        make_model(pred_steps=5)(images)
    with pytest.raises(ValueError, match="pred_directions=2 needs a square grid, got 5 x 4"):
        make_model(pred_directions=2)(images[..., :20])
    with pytest.raises(ValueError, match="modules must be 0 to 2, got 3"):
        make_model().freeze(3)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        GreedySupervised(ResNetV2Encoder(**BLOCKS), classes=1)
    with pytest.raises(ValueError, match="init must be he or delta-orthogonal, got 'normal'"):
        ResNetV2Encoder(**BLOCKS).reset_parameters("normal")


def test_only_the_last_module_has_the_context_network():
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(
        blocks=(1, 1), channels=(6, 6), stem_channels=4, in_channels=1, norm="layer", stem="cifar"
    )
    context = GatedPixelCNNContext(6, 1)
    model = GreedyInfoMax(encoder, 2, context=context, pred_steps=2, neg_samples="all").double().eval()
    patches = torch.rand(2, 5, 5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, last = (turned_grids(encodings, 1) for encodings in model.encodings_by_module(patches))
    outputs = model(patches)
    expected = [
        model.objectives[0](first, first),
        model.objectives[1](last, context(last[0])[None]),
        model.objectives[0](first, context(first[0])[None]),
        model.objectives[1](last, last),
    ]
    losses = [output.loss.item() for output in (*outputs, *expected)]
    assert losses[:2] == pytest.approx(losses[2:4], rel=1e-10)
    assert all(abs(loss - other) > 1e-4 for loss, other in zip(losses[:2], losses[4:], strict=True))
