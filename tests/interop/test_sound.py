"""Checkpoints of audio models: files and folders that other programs wrote, and files that they can read."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpc_ext.interop import CheckpointError, export_reference, load_reference, read_reference, save_reference
from cpc_ext.models import CPC, CausalTransformerContext, GreedyInfoMax, RecurrentContext, WaveformEncoder
from cpc_ext.nn import SequenceInfoNCE
from cpc_ext.training.random_streams import seeded

FILES = Path(__file__).parent / "checkpoints"
GOLDEN = Path(__file__).parents[1] / "golden"
# Settings, the class of the model, and where the features are that the program computes.
CHECKPOINTS = {
    "greedy_infomax_audio_gim6": ({"normalization": "none"}, GreedyInfoMax, "greedy_infomax_audio_gim6"),
    "greedy_infomax_audio_cpc": ({"normalization": "none"}, CPC, "greedy_infomax_audio_cpc"),
    "cpc_audio_lstm_linear": ({}, CPC, "cpc_audio_lstm_linear"),
    "cpc_audio_hub_form.pt": ({}, CPC, "cpc_audio_lstm_linear"),
}
# CPC_audio's sampling of negatives.
SHIFTED = {"sampling": "shifted", "common_positions": True, "pred_steps": 2}


def source_of(name):
    return "cpc-audio" if name.startswith("cpc_audio") else "greedy-infomax-audio"


def features_of(model, name):
    """Return the features of a waveform, as stored from the program and as computed by a model."""
    stored = load_file(FILES / f"{name}.features.safetensors")
    with torch.no_grad():
        encodings = model.encode(stored["input"])
        contexts = model.contextualize(encodings)
    if "z" in stored:
        torch.testing.assert_close(encodings, stored["z"].transpose(1, 2), atol=2e-6, rtol=0)
    return stored.get("c", stored.get("features")), contexts.transpose(1, 2)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_features(name):
    settings, kind, features = CHECKPOINTS[name]
    model = load_reference(FILES / name, source_of(name), **settings)
    assert type(model) is kind
    assert not model.training
    theirs, ours = features_of(model, features)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    name = "cpc_audio_hub_form.pt"
    read = read_reference(FILES / name, "cpc-audio")
    with pytest.raises(OSError, match="No such file or directory"):
        save_reference(read.model, "cpc-audio", tmp_path / "missing" / "checkpoint_0.pt", form=read.form)
    target = tmp_path / "checkpoint_0.pt"
    target.write_bytes(b"before")

    def full(tree, file):
        Path(getattr(file, "name", file)).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_reference(read.model, "cpc-audio", target, form=read.form)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("checkpoint_0.pt", b"before")]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files_that_the_programs_load(name, tmp_path):
    settings, _, features = CHECKPOINTS[name]
    read = read_reference(FILES / name, source_of(name), **settings)
    save_reference(read.model, source_of(name), tmp_path / "checkpoint_7.pt", form=read.form)

    content = torch.load(tmp_path / "checkpoint_7.pt", weights_only=True)
    # Only the log of a run of Greedy InfoMax states its number of negatives.
    told = {"neg_samples": 4} if "normalization" in settings else {}
    given = read_reference(tmp_path, source_of(name), **settings, **told)
    torch.testing.assert_close(*features_of(given.model, features), atol=1e-6, rtol=0)
    assert given.configuration == read.configuration
    if name == "cpc_audio_lstm_linear":
        original = torch.load(FILES / name / "checkpoint_0.pt", weights_only=True)
        for part in ("gEncoder", "cpcCriterion"):
            assert content[part].keys() == original[part].keys()
            assert all(torch.equal(value, original[part][key]) for key, value in content[part].items())
        options = json.loads((FILES / name / "checkpoint_args.json").read_text())
        written = json.loads((tmp_path / "checkpoint_args.json").read_text())
        assert len(written) > 10
        assert {key: options[key] for key in written} == written
    elif name == "cpc_audio_hub_form.pt":
        original = torch.load(FILES / name, weights_only=True)
        assert content.keys() == {"config", "weights"}
        assert content["weights"].keys() == original["weights"].keys()
        assert {key: original["config"][key] for key in content["config"]} == content["config"]
    else:
        original = torch.load(FILES / name / "model_1.ckpt", weights_only=True)
        assert content.keys() == original.keys()
        assert all(torch.equal(value, original[key]) for key, value in content.items())


def test_wrapped_models_and_dictionaries():
    content = torch.load(FILES / "cpc_audio_lstm_linear" / "checkpoint_0.pt", weights_only=True)
    expected = load_reference(content, "cpc-audio").state_dict()
    wrapped = {part: {f"module.{name}": one for name, one in content[part].items()} for part in ("gEncoder", "best")}
    wrapped["cpcCriterion"] = {f"module.{name}": value for name, value in content["cpcCriterion"].items()}
    found = load_reference(wrapped, "cpc-audio").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    # The model's state dict alone has no predictions.
    reference = read_reference(content["gEncoder"], "cpc-audio")
    assert reference.assumed == ("time runs forwards, from zeros", "predictions, which start anew")
    assert not reference.configuration["predictions"]
    assert read_reference(wrapped, "cpc-audio").configuration["predictions"]
    for part in ("encoder", "context"):
        for name, value in getattr(reference.model, part).state_dict().items():
            assert torch.equal(value, expected[f"{part}.{name}"])


def test_models_of_ours_get_the_prefix_of_the_program():
    model = load_reference(FILES / "greedy_infomax_audio_cpc", "greedy-infomax-audio", normalization="none")
    assert all(name.startswith("module.fullmodel.0.") for name in export_reference(model, "greedy-infomax-audio"))


# All but the probes, which are no part of a checkpoint.
MODELS = sorted(path for path in GOLDEN.glob("*_audio.*.safetensors") if path.stem != "cpc_audio.probes")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_written_again_they_are_the_same(path):
    given = {key.removeprefix("state."): one for key, one in load_file(path).items() if key.startswith("state.")}
    if path.stem == "cpc_audio.channel_norm":
        with pytest.raises(CheckpointError, match=r"None of cpc-audio, .* has such names"):
            load_reference(path, "cpc-audio")
        return
    read = read_reference(path, source_of(path.stem))
    written = export_reference(read.model, read.source, form=read.form)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], value) for key, value in given.items())
    # Our export also has the program's constants, which are not learned.
    complete = export_reference(read.model, read.source)
    for key, value in given.items():
        name = key if read.source == "cpc-audio" else f"module.{key}"
        torch.testing.assert_close(complete[name], value, atol=1e-12, rtol=0)


def test_samples_are_normalised_as_for_the_program():
    name = "greedy_infomax_audio_cpc"
    assert read_reference(FILES / name, "greedy-infomax-audio").assumed == ("normalization greedy-infomax",)
    samples = torch.randint(-(2**15), 2**15, (1, 1, 3200), dtype=torch.int16)
    model = load_reference(FILES / name, "greedy-infomax-audio")
    plain = load_reference(FILES / name, "greedy-infomax-audio", normalization="none")
    theirs = plain.encode(((samples.double() * 65536 + 1456218.75) / 135303504).float())
    for given in (samples, samples / 2.0**15):
        torch.testing.assert_close(model.encode(given), theirs, atol=1e-5, rtol=1e-5)


def test_options_of_greedy_infomax_from_its_log(tmp_path):
    shutil.copy(FILES / "greedy_infomax_audio_cpc" / "model_1.ckpt", tmp_path / "model_3.ckpt")
    source = "greedy-infomax-audio"

    def objective(**settings):
        found = load_reference(tmp_path / "model_3.ckpt", source, **settings).objective
        return found.pred_steps, found.neg_samples, found.sampling, found.subsample

    assert objective() == (5, 10, "permuted", None)
    for method, sampling in enumerate(("offsets", "permuted", "same-sequence")):
        (tmp_path / "log.txt").write_text(
            f"Namespace(batch_size=8, negative_samples=7, sampling_method={method}, train_layer=6, subsample=True)\n"
        )
        assert objective() == (5, 7, sampling, 128)
    assert objective(neg_samples=3) == (5, 3, "same-sequence", 128)


def test_options_of_cpc_audio_from_beside_the_file(tmp_path):
    shutil.copy(FILES / "cpc_audio_lstm_linear" / "checkpoint_0.pt", tmp_path / "checkpoint_0.pt")
    assert read_reference(tmp_path, "cpc-audio").assumed
    model = load_reference(tmp_path, "cpc-audio")
    assert (model.objective.neg_samples, model.objective.dropout.p) == (128, 0)
    assert (model.context.reverse, model.context.keep_state, model.objective.reverse) == (False, False, False)
    options = {"cpc_mode": "reverse", "samplingType": "sequential", "negativeSamplingExt": 9, "dropout": True}
    (tmp_path / "checkpoint_args.json").write_text(json.dumps(options))
    reference = read_reference(tmp_path, "cpc-audio")
    model = reference.model
    assert not reference.assumed
    assert (model.objective.neg_samples, model.objective.dropout.p) == (9, 0.5)
    assert model.context.reverse
    assert model.context.keep_state
    assert model.objective.reverse
    (tmp_path / "checkpoint_args.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*checkpoint_args.json"):
        load_reference(tmp_path, "cpc-audio")


@pytest.mark.parametrize("name", ["cpc_audio_lstm_linear", "greedy_infomax_audio_cpc"])
def test_options_are_looked_for_once(name, monkeypatch):
    program = import_module(f"cpc_ext.interop.sources.{source_of(name).replace('-', '_')}").PROGRAM
    found, look = [], program.noted_in_name
    monkeypatch.setattr(program, "noted_in_name", lambda checkpoint: found.append(checkpoint.files) or look(checkpoint))
    load_reference(FILES / name, program.source)
    (files,) = found
    assert [file.parent for file in files] == [FILES / name]


def test_the_last_epoch_of_a_folder_counts(tmp_path):
    for epoch, name in ((9, "model_0.ckpt"), (10, "model_1.ckpt")):
        shutil.copy(FILES / "greedy_infomax_audio_gim6" / name, tmp_path / f"model_{epoch}.ckpt")
    (tmp_path / "optim_11.ckpt").write_bytes(b"")
    last = load_reference(tmp_path, "greedy-infomax-audio").state_dict()
    expected = load_reference(tmp_path / "model_10.ckpt", "greedy-infomax-audio").state_dict()
    other = load_reference(tmp_path / "model_9.ckpt", "greedy-infomax-audio").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in last.items())
    assert not all(torch.equal(value, other[name]) for name, value in last.items())
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="folder without checkpoints"):
        load_reference(tmp_path / "none", "greedy-infomax-audio")


def test_options_that_cpc_audio_builds_models_from(tmp_path):
    encoder = WaveformEncoder(8, norm="instance", padding="cpc-audio")
    context = CausalTransformerContext(8, 9, layers=2, hidden=5, reverse=True)
    objective = {**SHIFTED, "score": "mean", "neg_samples": 7, "reverse": True}
    model = CPC(encoder, context, SequenceInfoNCE(8, predictor="lstm", dropout=0.5, **objective))
    save_reference(model, "cpc-audio", tmp_path / "checkpoint_0.pt")
    assert json.loads((tmp_path / "checkpoint_args.json").read_text()) == {
        "encoder_type": "cpc",
        "hiddenEncoder": 8,
        "hiddenGar": 8,
        "normMode": "instanceNorm",
        "nPredicts": 2,
        "negativeSamplingExt": 7,
        "rnnMode": "LSTM",
        "dropout": True,
        "cpc_mode": "reverse",
        "samplingType": "samespeaker",
        "arMode": "transformer",
        "abspos": False,
        "nLevelsGRU": 2,
        "sizeWindow": 1440,
    }
    found = load_reference(tmp_path, "cpc-audio")
    waveforms = torch.rand(2, 1, 1440)
    encodings = model.eval().encode(waveforms)
    torch.testing.assert_close(found.encode(waveforms), encodings)
    torch.testing.assert_close(found.contextualize(encodings), model.contextualize(encodings))
    predicts = CPC(
        encoder,
        RecurrentContext(8, 8, kind="rnn", layers=2, keep_state=True, reverse=True),
        SequenceInfoNCE(8, predictor="transformer", window=11, **objective),
    )
    save_reference(predicts, "cpc-audio", tmp_path / "checkpoint_1.pt")
    written = json.loads((tmp_path / "checkpoint_args.json").read_text())
    given = {
        "arMode": "RNN",
        "nLevelsGRU": 2,
        "samplingType": "sequential",
        "rnnMode": "transformer",
        "sizeWindow": 1760,
    }
    assert {name: written[name] for name in given} == given
    assert load_reference(tmp_path, "cpc-audio").objective.window == 11


def cpc_audio_state(**objective):
    encoder, context = WaveformEncoder(8, norm="channel", padding="cpc-audio"), CausalTransformerContext(8, 6)
    return export_reference(CPC(encoder, context, SequenceInfoNCE(8, **{**SHIFTED, **objective})), "cpc-audio")


def test_what_is_not_the_programs_is_refused():
    state = cpc_audio_state()
    mask = "gEncoder.gAR.0.multihead.Att.mask"
    with pytest.raises(CheckpointError, match="mask hides other positions"):
        load_reference(state | {mask: torch.zeros(1, 6, 6)}, "cpc-audio")
    with pytest.raises(CheckpointError, match=r"z must be zeros"):
        load_reference(state | {mask.replace("mask", "z"): torch.ones(1, 6, 1)}, "cpc-audio")
    moved = {name.replace("gAR.0", "gAR.1"): value for name, value in state.items() if "Krelpos" not in name}
    with pytest.raises(CheckpointError, match="pe are not the sines"):
        load_reference(moved | {"gEncoder.gAR.0.pe": torch.zeros(1, 6, 8)}, "cpc-audio")
    with pytest.raises(CheckpointError, match=r"gAR\.2\.multihead"):
        load_reference({name.replace("gAR.0", "gAR.2"): value for name, value in state.items()}, "cpc-audio")
    recurrent = {f"{name}_l0": torch.zeros(8, *([8] * name.startswith("w"))) for name in ("weight_ih", "weight_hh")}
    others = {name: value for name, value in state.items() if "predictors" not in name}
    with pytest.raises(CheckpointError, match=r"predictors\.0\.weight_ih_l0"):
        load_reference(
            others | {f"cpcCriterion.wPrediction.predictors.0.{name}": one for name, one in recurrent.items()},
            "cpc-audio",
        )
    with pytest.raises(CheckpointError, match=r"speakerEmb"):
        load_reference(state | {"cpcCriterion.speakerEmb.weight": torch.zeros(3, 3)}, "cpc-audio")
    with pytest.raises(CheckpointError, match="It looks like cpc-audio"):
        load_reference(state, "greedy-infomax-audio")


@pytest.fixture(autouse=True)
def same_weights():
    """Some weights of encoders as small as these leave no unit alive."""
    with seeded(0):
        yield


def assert_same_losses(model, back):
    """Assert that two models have the same losses on waveforms, with the same negatives."""
    waveforms = torch.rand(2, 1, 3200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for one in (model.eval(), back):
        made = one(waveforms, generator=torch.Generator().manual_seed(1))
        outputs.append([output.step_losses for output in made] if isinstance(made, list) else [made.step_losses])
    for mine, theirs in zip(*outputs, strict=True):
        # Losses that are all alike, as those of guessing, would hide a factor.
        assert mine.std() > 1e-8
        torch.testing.assert_close(theirs, mine, rtol=1e-12, atol=0)


def louder(model):
    """Return the model in float64, with weights scaled so that predictions are not near 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "objective" in name:
                parameter *= 30
    return model.double()


@pytest.mark.parametrize("score", ["dot", "mean"])
def test_scores_are_the_same_in_cpc_audio(score):
    encoder = WaveformEncoder(12, norm="channel", padding="cpc-audio")
    objective = SequenceInfoNCE(12, 5, score=score, neg_samples=6, **SHIFTED)
    model = louder(CPC(encoder, RecurrentContext(12, 5), objective))
    state = export_reference(model, "cpc-audio")
    # The program divides scores by the 12 channels.
    for step in range(2):
        expected = objective.weight[step] * (12 if score == "dot" else 1)
        assert torch.equal(state[f"cpcCriterion.wPrediction.predictors.{step}.weight"], expected)
    back = load_reference(state, "cpc-audio", neg_samples=6)
    assert back.objective.score == "mean"
    assert_same_losses(model, back)


@pytest.mark.parametrize("predictor", ["transformer", "ffd", "conv4", "lstm"])
def test_scores_that_no_matrix_makes_up_for_are_refused(predictor):
    encoder, context = WaveformEncoder(8, padding="cpc-audio"), RecurrentContext(8, 8)
    summed = CPC(encoder, context, SequenceInfoNCE(8, predictor=predictor, **SHIFTED))
    with pytest.raises(CheckpointError, match=rf'divides scores by the channels, here 8, .*"{predictor}", does not'):
        export_reference(summed, "cpc-audio")
    mean = louder(
        CPC(encoder, context, SequenceInfoNCE(8, predictor=predictor, score="mean", neg_samples=6, **SHIFTED))
    )
    assert_same_losses(mean, load_reference(export_reference(mean, "cpc-audio"), "cpc-audio", neg_samples=6))


@pytest.mark.parametrize("score", ["dot", "mean"])
def test_scores_are_the_same_in_greedy_infomax(score):
    widths = (4, 5, 6, 7, 8)
    settings = {"pred_steps": 2, "neg_samples": 6, "score": score}
    encoder, told = WaveformEncoder(widths), {"neg_samples": 6, "normalization": "none"}
    modules = louder(GreedyInfoMax(encoder, 5, context=RecurrentContext(8, 3), objective=SequenceInfoNCE, **settings))
    state = export_reference(modules, "greedy-infomax-audio")
    # The program sums products over the channels, as many as the module has.
    for module, channels in enumerate(widths):
        expected = modules.objectives[module].weight.flatten(0, 1) / (channels if score == "mean" else 1)
        assert torch.equal(state[f"module.fullmodel.{module}.loss.predictor.weight"], expected)
    back = load_reference(state, "greedy-infomax-audio", **told)
    assert [objective.score for objective in back.objectives] == ["dot"] * 5
    assert_same_losses(modules, back)
    one = louder(CPC(WaveformEncoder(6), RecurrentContext(6, 3), SequenceInfoNCE(6, 3, **settings)))
    assert_same_losses(
        one, load_reference(export_reference(one, "greedy-infomax-audio"), "greedy-infomax-audio", **told)
    )


def test_models_that_the_programs_do_not_have():
    greedy, objective = WaveformEncoder(8), SequenceInfoNCE(8, pred_steps=2)
    for context, problem in (
        (RecurrentContext(8, 8, layers=2), "GRU of one layer"),
        (RecurrentContext(8, 8, kind="lstm"), "GRU of one layer"),
        (RecurrentContext(8, 8, reverse=True), "run forwards"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            export_reference(CPC(greedy, context, objective), "greedy-infomax-audio")
    gru = RecurrentContext(8, 8)
    with pytest.raises(CheckpointError, match="without norm, with paddings"):
        export_reference(CPC(WaveformEncoder(8, norm="batch"), gru, objective), "greedy-infomax-audio")
    with pytest.raises(CheckpointError, match="by matrices"):
        export_reference(CPC(greedy, gru, SequenceInfoNCE(8, pred_steps=2, predictor="ffd")), "greedy-infomax-audio")
    backwards = SequenceInfoNCE(8, pred_steps=2, reverse=True)
    with pytest.raises(CheckpointError, match="predicts forwards"):
        export_reference(CPC(greedy, gru, backwards), "greedy-infomax-audio")
    with pytest.raises(CheckpointError, match=r"paddings 3, 2, 1, 1, 1 \(--padding cpc-audio\), not \(2, "):
        export_reference(CPC(greedy, gru, objective), "cpc-audio")
    theirs = WaveformEncoder(8, padding="cpc-audio")
    with pytest.raises(CheckpointError, match="shifted frames"):
        export_reference(CPC(theirs, gru, objective), "cpc-audio")
    with pytest.raises(CheckpointError, match="one direction of time"):
        export_reference(CPC(theirs, gru, SequenceInfoNCE(8, reverse=True, **SHIFTED)), "cpc-audio")
    for context in (CausalTransformerContext(8, absolute=True, heads=4), CausalTransformerContext(8, heads=4)):
        with pytest.raises(CheckpointError, match="transformers of 8 heads, this one has 4"):
            export_reference(CPC(theirs, context, SequenceInfoNCE(8, **SHIFTED)), "cpc-audio")
    with pytest.raises(CheckpointError, match="normalises samples by constants of its own"):
        export_reference(CPC(WaveformEncoder(8, normalization=(2.0, 0.5)), gru, objective), "greedy-infomax-audio")
    normalised = WaveformEncoder(8, padding="cpc-audio", normalization="greedy-infomax")
    with pytest.raises(CheckpointError, match="does not normalise"):
        export_reference(CPC(normalised, gru, objective), "cpc-audio")
