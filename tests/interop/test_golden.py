"""Every golden problem with weights, loaded as a checkpoint given only its source, and written again."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.interop import CheckpointError, export_reference, load_reference, read_reference
from cpc_ext.models import (
    CPC,
    BinaryGatedPixelCNN,
    GatedPixelCNNContext,
    GreedyInfoMax,
    PixelCNNPP,
    ResidualContext,
    ResNetV2Encoder,
)
from cpc_ext.models.encoders.wide_resnet import WideResNetEncoder
from cpc_ext.nn import GridInfoNCE

EXACT = {"atol": 1e-10, "rtol": 0}
# The programs take log(p + 1e-11), which moves losses this far from an exact log-softmax.
LOG_EPSILON = {"atol": 1e-7, "rtol": 0}

CHECKPOINTS = {
    "cpcv2_pytorch.resnet_none": ("cpcv2-pytorch", ResNetV2Encoder),
    "cpcv2_pytorch.resnet_layer": ("cpcv2-pytorch", ResNetV2Encoder),
    "cpcv2_pytorch.resnet_batch": ("cpcv2-pytorch", ResNetV2Encoder),
    "cpcv2_pytorch.wide_resnet": ("cpcv2-pytorch", WideResNetEncoder),
    "cpcv2_pytorch.cpc_1dir": ("cpcv2-pytorch", CPC),
    "cpcv2_pytorch.cpc_4dir": ("cpcv2-pytorch", CPC),
    "greedy_infomax.pixelcnn": ("greedy-infomax", GatedPixelCNNContext),
    "greedy_infomax.info_nce": ("greedy-infomax", GridInfoNCE),
    "greedy_infomax.modules": ("greedy-infomax", GreedyInfoMax),
    "lightning_bolts.pixelcnn": ("lightning-bolts", ResidualContext),
    "lightning_bolts.cpc_task": ("lightning-bolts", CPC),
    "pixel_cnn_pp.model_1ch": ("pixel-cnn-pp", PixelCNNPP),
    "pixel_cnn_pp.model_3ch": ("pixel-cnn-pp", PixelCNNPP),
    "pytorch_generative.gated_pixelcnn": ("pytorch-generative", BinaryGatedPixelCNN),
}


def load(problem, name):
    """The problem's model in evaluation mode, and its tensors."""
    given = problem(name)
    source, kind = CHECKPOINTS[name]
    model = load_reference(given.path, source)
    assert type(model) is kind
    assert not model.training
    return model, given.tensors


def draws(tensors, prefix, count, samples):
    """Recorded negatives, [M, S] each."""
    return [tensors[f"{prefix}{index}"].view(-1, samples) for index in range(count)]


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "resnet" in name])
def test_encoders(problem, name):
    encoder, tensors = load(problem, name)
    encodings = encoder(tensors["x"]).permute(0, 2, 3, 1)
    torch.testing.assert_close(encodings, tensors["y"], **EXACT)


@pytest.mark.parametrize("directions", [1, 4])
def test_cpc(problem, directions):
    model, tensors = load(problem, f"cpcv2_pytorch.cpc_{directions}dir")
    negatives = draws(tensors, "negatives.", directions * 3, model.objective.neg_samples)

    output = model(tensors["x"], negatives=negatives)
    output.loss.backward()

    torch.testing.assert_close(output.loss, tensors["loss"], **LOG_EPSILON)
    torch.testing.assert_close(model.encoder.conv1.weight.grad, tensors["grad.enc.conv1.weight"], **LOG_EPSILON)


@pytest.mark.parametrize("name", ["greedy_infomax.pixelcnn", "lightning_bolts.pixelcnn"])
def test_contexts(problem, name):
    context, tensors = load(problem, name)
    encodings = tensors["z"].requires_grad_()

    contexts = context(encodings)
    contexts.backward(tensors["grad_y"])

    torch.testing.assert_close(contexts, tensors["y"], **EXACT)
    torch.testing.assert_close(encodings.grad, tensors["grad_z"], **EXACT)


def test_info_nce(problem):
    objective, tensors = load(problem, "greedy_infomax.info_nce")
    negatives = draws(tensors, "negatives.", 3, objective.neg_samples)

    output = objective(tensors["z"][None], tensors["c"][None], negatives=negatives)
    output.loss.backward()

    torch.testing.assert_close(output.loss, tensors["loss"], **LOG_EPSILON)
    for step in range(3):
        torch.testing.assert_close(objective.weight.grad[0, step], tensors[f"grad_W.{step}"][:, :, 0, 0], **LOG_EPSILON)


def test_modules(problem):
    model, tensors = load(problem, "greedy_infomax.modules")
    samples = model.objectives[0].neg_samples
    negatives = [draws(tensors, f"negatives.{module}.", 2, samples) for module in range(3)]

    for module, encodings in enumerate(model.encodings_by_module(tensors["x"])):
        torch.testing.assert_close(encodings, tensors[f"out.{module}"], **EXACT)
    for module, output in enumerate(model.outputs(tensors["x"], negatives=negatives)):
        output.loss.backward()
        torch.testing.assert_close(output.loss, tensors[f"loss.{module}"], **LOG_EPSILON)
    torch.testing.assert_close(model.encoder.conv1.weight.grad, tensors["grad.0.model.Conv1.weight"], **LOG_EPSILON)


def test_cpc_task(problem):
    model, tensors = load(problem, "lightning_bolts.cpc_task")
    encodings = tensors["z"].requires_grad_()

    output = model(encodings)
    output.loss.backward()

    torch.testing.assert_close(output.loss, tensors["loss"], **EXACT)
    torch.testing.assert_close(encodings.grad, tensors["grad_z"], **EXACT)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixelcnnpp(problem, channels):
    model, tensors = load(problem, f"pixel_cnn_pp.model_{channels}ch")

    params = model.mixture(tensors["x"], None)

    torch.testing.assert_close(params, tensors["y"], atol=1e-9, rtol=1e-9)
    if "nll_sum" in tensors:
        images = ((tensors["x"] + 1) * 127.5).round().to(torch.uint8)
        torch.testing.assert_close(model.nats(images).sum(), tensors["nll_sum"], atol=1e-9, rtol=1e-9)


def test_gated_pixelcnn(problem):
    model, tensors = load(problem, "pytorch_generative.gated_pixelcnn")

    torch.testing.assert_close(model(tensors["x"]), tensors["y"], **EXACT)
    loss = model.nats(tensors["x"]).mean()
    loss.backward()

    torch.testing.assert_close(loss, tensors["loss"], **EXACT)
    gradient = model.first.vertical_rows.weight.grad
    torch.testing.assert_close(gradient, tensors["grad._input._vstack_1xN.weight"], **EXACT)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_again_they_are_the_same(problem, name):
    given, (source, _) = problem(name), CHECKPOINTS[name]
    reference = read_reference(given.path, source)

    written = export_reference(reference.model, source, form=reference.form)

    assert written.keys() == given.state.keys()
    for key, value in given.state.items():
        assert written[key].dtype == value.dtype, key
        assert torch.equal(written[key], value), key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_alone_load_as_well(problem, name):
    given, (source, kind) = problem(name), CHECKPOINTS[name]
    settings = {} if source in ("pixel-cnn-pp", "pytorch-generative") else {"grid_size": 5}
    if name in ("cpcv2_pytorch.resnet_layer", "cpcv2_pytorch.wide_resnet", "cpcv2_pytorch.cpc_4dir"):
        settings["norm"] = "layer"
    model = load_reference(given.state, source, **settings)
    assert type(model) is kind
    expected = load_reference(given.path, source).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["lightning_bolts.nt_xent"])
def test_problems_without_weights_are_refused(problem, name):
    with pytest.raises(CheckpointError, match="has such names"):
        load_reference(problem(name).path, "lightning-bolts")
