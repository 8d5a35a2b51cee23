"""Greedy InfoMax's models of sound, reproduced from their weights and draws."""

import pytest
import torch

from cpc_ext.models import CPC, GreedyInfoMax
from cpc_ext.nn import SequenceNegatives

EXACT = {"atol": 1e-10, "rtol": 0}
SOURCE = "greedy-infomax-audio"
# Modules, and those that have a GRU.
PROBLEMS = {
    "cpc": (1, 1),
    "cpc_method0": (1, 1),
    "cpc_method2": (1, 1),
    "cpc_no_bptt": (1, 1),
    "gim5": (5, 1),
    "gim6": (6, 1),
    "gim6_autoregressive": (5, 5),
    "gim6_subsample": (6, 1),
}


def draws(tensors, modules):
    """Return the recorded draws of each module."""
    found = []
    for module in range(modules):
        offsets = [tensors[name] for name in sorted(tensors) if name.startswith(f"offsets.{module}.")]
        begin = tensors.get(f"window_begin.{module}")
        found.append(SequenceNegatives(offsets or tensors[f"negatives.{module}"], begin))
    return found


def outputs(model, waveforms, tensors):
    """Return the outputs of every module's loss."""
    negatives = draws(tensors, len(tensors["losses"]))
    return (
        [model(waveforms, negatives=negatives[0])] if isinstance(model, CPC) else model(waveforms, negatives=negatives)
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_encodings_and_contexts(golden, reference, name):
    model = reference(f"greedy_infomax_audio.{name}", SOURCE, normalization="none").model
    tensors = golden(f"greedy_infomax_audio.{name}").tensors
    modules, contexts = PROBLEMS[name]
    assert type(model) is (CPC if modules == 1 else GreedyInfoMax)
    waveforms = tensors["input"]
    encodings = [model.encode(waveforms)] if modules == 1 else model.encodings_by_module(waveforms)
    assert len(encodings) == modules
    assert len([key for key in tensors if key.startswith("c.")]) == contexts
    for module, own in enumerate(encodings):
        if f"z.{module}" in tensors:
            torch.testing.assert_close(own, tensors[f"z.{module}"].transpose(1, 2), **EXACT)
        if f"c.{module}" in tensors:
            made = model.contextualize(own) if modules == 1 else model.contextualize(own, module)
            torch.testing.assert_close(made, tensors[f"c.{module}"].transpose(1, 2), **EXACT)


@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_and_gradients(golden, reference, gradients, name):
    read = reference(f"greedy_infomax_audio.{name}", SOURCE, normalization="none")
    tensors = golden(f"greedy_infomax_audio.{name}").tensors
    waveforms = tensors["input"].requires_grad_()

    found = outputs(read.model, waveforms, tensors)
    sum(output.loss for output in found).backward()

    # In one frame a module's encoding is zero, so that all keys score alike: right there, and wrong here.
    ties = {"atol": 0.004 if name == "gim6_subsample" else 1e-10, "rtol": 0}
    for module, output in enumerate(found):
        torch.testing.assert_close(output.loss, tensors["losses"][module], **EXACT)
        torch.testing.assert_close(output.step_losses, tensors["step_losses"][module], **EXACT)
        torch.testing.assert_close(output.accuracy, tensors["accuracies"][module], **ties)
    torch.testing.assert_close(waveforms.grad, tensors["grad.input"], **EXACT)
    slopes = gradients(read)
    names = {key.removeprefix("grad.") for key in tensors if key.startswith("grad.") and key != "grad.input"}
    assert names == slopes.keys()
    for key in names:
        torch.testing.assert_close(slopes[key], tensors[f"grad.{key}"], **EXACT)


def test_single_precision(golden, reference):
    model = reference("greedy_infomax_audio.gim6", SOURCE, normalization="none").model.float()
    tensors = golden("greedy_infomax_audio.gim6").tensors
    for output, loss in zip(outputs(model, tensors["input"].float(), tensors), tensors["losses"], strict=True):
        torch.testing.assert_close(output.loss, loss.float(), atol=1e-5, rtol=1e-5)
