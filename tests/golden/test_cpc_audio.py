"""CPC_audio's models and criterion, reproduced from their weights and draws."""

import pytest
import torch

from cpc_ext.nn import ChannelNorm

EXACT = {"atol": 1e-10, "rtol": 0}
PROBLEMS = [
    "artransformer_linear",
    "conv4_nonorm",
    "ffd_instancenorm",
    "gru_linear_batchnorm",
    "lstm_linear",
    "lstm_predictor",
    "lstm_transformer",
    "reverse",
]


@pytest.fixture
def problem(golden, reference):
    """Return the stored problem, and its model in the mode in which it was run."""

    def load(name):
        stored, read = golden(f"cpc_audio.{name}"), reference(f"cpc_audio.{name}", "cpc-audio")
        read.model.train(stored.config["mode"] == "train")
        return stored, read

    return load


def check(output, tensors, suffix=""):
    torch.testing.assert_close(output.loss, tensors[f"loss{suffix}"], **EXACT)
    torch.testing.assert_close(output.step_losses, tensors[f"step_losses{suffix}"], **EXACT)
    torch.testing.assert_close(output.step_accuracies.float(), tensors[f"accuracies{suffix}"])
    torch.testing.assert_close(output.mutual_information, torch.log(tensors["samples"]) - output.step_losses.mean())


@pytest.mark.parametrize("name", PROBLEMS)
def test_encodings_and_contexts(problem, name):
    (tensors, _), read = problem(name)
    encodings = read.model.encode(tensors["input"])
    torch.testing.assert_close(encodings, tensors["z"].transpose(1, 2), **EXACT)
    contexts = read.model.contextualize(encodings)
    torch.testing.assert_close(contexts, tensors["c"].transpose(1, 2), **EXACT)


@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_and_gradients(problem, gradients, name):
    (tensors, config), read = problem(name)
    waveforms = tensors["input"].requires_grad_()

    output = read.model(waveforms, negatives=tensors["negatives"])
    output.loss.backward()

    check(output, tensors | {"samples": torch.tensor(config["negativeSamplingExt"] + 1.0, dtype=torch.float64)})
    torch.testing.assert_close(waveforms.grad, tensors["grad.input"], **EXACT)
    slopes = gradients(read)
    names = {key.removeprefix("grad.") for key in tensors if key.startswith("grad.") and key != "grad.input"}
    assert len(names) > 19
    for key in names:
        torch.testing.assert_close(slopes[key], tensors[f"grad.{key}"], **EXACT)


def test_running_statistics(problem):
    (tensors, _), read = problem("gru_linear_batchnorm")
    read.model.encode(tensors["input"])
    for layer, block in enumerate(read.model.encoder.layers):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            expected = tensors[f"after.gEncoder.gEncoder.batchNorm{layer}.{name}"]
            torch.testing.assert_close(getattr(block.norm, name), expected, **EXACT)


@pytest.mark.parametrize(("name", "parts"), [("gru_sequential", 1), ("lstm2_sequential", 2)])
def test_state_kept_between_windows(problem, gradients, name, parts):
    (tensors, _), read = problem(name)
    for window in range(2):
        waveforms = tensors[f"input.{window}"].requires_grad_()
        read.model.zero_grad()

        output = read.model(waveforms, negatives=tensors[f"negatives.{window}"])
        output.loss.backward()

        check(output, tensors | {"samples": torch.tensor(6.0, dtype=torch.float64)}, f".{window}")
        torch.testing.assert_close(waveforms.grad, tensors[f"grad.input.{window}"], **EXACT)
        for part in range(parts):
            states = [state[part] if isinstance(state, tuple) else state for state in read.model.context.state]
            torch.testing.assert_close(torch.cat(states), tensors[f"hidden_out.{part}.{window}"], **EXACT)
        slopes = gradients(read)
        assert len(slopes) > 19
        for key, slope in slopes.items():
            torch.testing.assert_close(slope, tensors[f"grad.{key}.{window}"], **EXACT)


def test_channel_norm(golden):
    problem = golden("cpc_audio.channel_norm")
    tensors = problem.tensors
    norm = ChannelNorm(12, problem.config["epsilon"]).double()
    norm.load_state_dict({name: value.flatten() for name, value in problem.state().items()})
    sequence = tensors["input"].requires_grad_()

    normalized = norm(sequence)
    normalized.backward(tensors["grad_output"])

    torch.testing.assert_close(normalized, tensors["output"], **EXACT)
    torch.testing.assert_close(sequence.grad, tensors["grad.input"], **EXACT)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"grad.{name}"].flatten(), **EXACT)
