"""Speech tasks: the effect of every option, batches determined by seeds, and evaluation of models."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cpc_ext.data import BatchShare, SpeechDataset, WaveformSet, label_count
from cpc_ext.measures.speech_frames import RecordingFrames, phone_probe
from cpc_ext.models import CPC, CausalTransformerContext, GreedyInfoMax, RecurrentContext, WaveformEncoder
from cpc_ext.nn import ChannelNorm
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks import speech_task
from cpc_ext.training import registry
from cpc_ext.training.config import OptionError, option, validate_config
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loop import Trainer
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog
from cpc_ext.training.task import Handover
from tests.tasks.test_trouble import assert_guessing_is_told

CPU = torch.device("cpu")
MODELS = tuple(model for model in registry.MODELS if registry.model_medium(model) == "audio")
WINDOW = 40 * 160
BASE = {
    "data": {"dataset": "voices"},
    "view": {"window": WINDOW},
    "encoder": {"channels": 8},
    "context": {"context_channels": 8},
    "prediction": {"pred_steps": 3, "neg_samples": 4},
    "optimization": {"steps": 4, "batch_size": 4},
}
# The sections that tasks of speech look at; the others are the loop's.
SECTIONS = ("probe", "view", "encoder", "context", "prediction", "greedy")


def config_of(model="cpc-audio", **options):
    tree: dict[str, Any] = copy.deepcopy(BASE)
    fields = registry.config_class(model).model_fields
    for name, value in options.items():
        section = next(
            section
            for section, field in fields.items()
            if hasattr(field.annotation, "model_fields") and name in field.annotation.model_fields
        )
        tree.setdefault(section, {})[name] = value
    return validate_config({"model": model, **tree})


# Frequency of each phone in Hz; comparisons of phones take the first for silence.
TONES = (200, 450, 1000, 2100, 4000)


def recordings(count=8, seconds=1.0, *, labelled=True):
    """Return noise whose spectrum shows the phone, of two speakers, one louder than the other."""
    rng = np.random.default_rng(0)
    lengths = [int(16000 * seconds) + 160 * number for number in range(count)]
    sounds, phones = [], []
    for number, length in enumerate(lengths):
        labels = np.repeat(rng.integers(0, len(TONES), length), 8)[: label_count(length)]
        centres = np.clip((np.arange(length) - 200) // 160, 0, len(labels) - 1)
        tone = np.sin(2 * np.pi * np.array(TONES)[labels[centres]] * np.arange(length) / 16000)
        loud = 4000 if number < count // 2 else 1000
        sounds.append((loud * (tone + 0.3 * rng.standard_normal(length))).astype(np.int16))
        phones.append(labels.astype(np.uint8))
    return WaveformSet(
        np.concatenate(sounds),
        np.cumsum([0, *lengths]).astype(np.int64),
        [f"{number // (count // 2)}-0-{number}" for number in range(count)],
        np.repeat(np.arange(2), count // 2) if labelled else None,
        np.concatenate(phones) if labelled else None,
        np.cumsum([0, *map(len, phones)]).astype(np.int64) if labelled else None,
    )


def dataset_of(train=None, test=None):
    train = recordings() if train is None else train
    return SpeechDataset("voices", train, test, ("loud", "quiet"), ("SIL", "A", "E", "I", "O"))


def task_of(model="cpc-audio", dataset=None, **options):
    return task_class(model)(config_of(model, **options), dataset or dataset_of(), CPU)


def batch_of(task, seed=0):
    sampler = task.sampler(4, seed=seed, rank=0, world_size=1)
    starts = next(iter(sampler))
    fetch = task.fetcher(CPU, RandomStreams(0, CPU))
    return fetch(starts), fetch.labels(starts)


def step(task, *, seed=0):
    torch.manual_seed(seed)
    task.model.train()
    return task.losses(*batch_of(task), RandomStreams(seed, CPU))


def objectives(task):
    return [task.model.objective] if isinstance(task.model, CPC) else list(task.model.objectives)


def contexts(task):
    return [each for each in task.model.modules() if isinstance(each, RecurrentContext | CausalTransformerContext)]


# Options of the objective: for each, the options to set; the objective must then have its value.
OF_OBJECTIVE: dict[str, dict[str, Any]] = {
    "pred_steps": {"pred_steps": 5},
    "predictor": {"predictor": "ffd"},
    "sampling": {"sampling": "offsets"},
    "neg_samples": {"neg_samples": 7},
    "exclude_positive": {"exclude_positive": True, "sampling": "shifted"},
    "same_speaker": {"same_speaker": True},
    "subsample": {"subsample": 20},
    "common_positions": {"common_positions": True},
    "reduction": {"reduction": "sum"},
    "score": {"score": "mean"},
    "gather_negatives": {"gather_negatives": "none"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OF_OBJECTIVE)
def test_options_of_the_objective(model, name):
    plain, changed = task_of(model), task_of(model, **OF_OBJECTIVE[name])
    for before, after in zip(objectives(plain), objectives(changed), strict=True):
        assert getattr(before, name) != getattr(after, name) == OF_OBJECTIVE[name][name]
    if name != "gather_negatives":  # Of a single process.
        # Other losses, but for weights that are others.
        assert step(changed)["loss"].item() != step(plain)["loss"].item()


@pytest.mark.parametrize("model", MODELS)
def test_dropout(model):
    task = task_of(model, dropout=0.5)
    assert {objective.dropout.p for objective in objectives(task)} == {0.5}
    assert step(task, seed=0)["loss"].item() != step(task_of(model), seed=0)["loss"].item()


@pytest.mark.parametrize("model", MODELS)
def test_options_of_the_networks(model):
    task = task_of(model, channels=12, padding="cpc-audio", norm="channel", normalization="none", context_channels=6)
    encoder = task.model.encoder
    assert (encoder.out_channels, encoder.first_center, encoder.normalization) == (12, 79, (1.0, 0.0))
    assert sum(isinstance(module, ChannelNorm) for module in encoder.modules()) == 5
    assert {context.out_channels for context in contexts(task)} == {6}
    (recurrent,) = contexts(task_of(model, context="lstm", context_layers=2))
    assert (recurrent.kind, len(recurrent.layers)) == ("lstm", 2)
    (recurrent,) = contexts(task_of(model, backprop_through_time=False))
    assert recurrent.remove_bptt
    (transformer,) = contexts(task_of(model, context="transformer"))
    assert isinstance(transformer, CausalTransformerContext)
    assert transformer.window == WINDOW // 160
    for built in (task_of(model, context="transformer"), task_of(model, predictor="transformer")):
        assert torch.isfinite(step(built)["loss"])


@pytest.mark.parametrize("model", MODELS)
def test_windows(model):
    task = task_of(model, windows="same-speaker", window=3200, cross_borders=False)
    sampler = task.sampler(2, seed=1, rank=0, world_size=1)
    assert (sampler.kind, sampler.window, sampler.cross_borders) == ("same-speaker", 3200, False)
    assert [batch.tolist() for batch in sampler] != [
        batch.tolist() for batch in task.sampler(2, seed=2, rank=0, world_size=1)
    ]
    waveforms, speakers = batch_of(task)
    assert (waveforms.dtype, waveforms.shape) == (torch.int16, (4, 1, 3200))
    assert len(set(speakers.tolist())) == 1


@pytest.mark.parametrize("windows", ["same-sequence", "same-speaker"])
def test_recordings_of_fewer_windows_than_a_batch_are_heard(windows):
    task = task_of(windows=windows, window=3200, cross_borders=False)
    sampler = task.sampler(64, seed=1, rank=0, world_size=1)
    sizes = [len(batch) for batch in sampler]
    assert len(sizes) > 1
    assert all(1 <= size < 64 for size in sizes)
    # Shares of ranks are equal.
    with pytest.raises(ValueError, match="batch_size: expected at most"):
        task.sampler(64, seed=1, rank=0, world_size=2)


def test_modules_of_greedy_infomax():
    for modules, parts in ((1, 1), (5, 5), (6, 6)):
        task = task_of("greedy-infomax-audio", modules=modules)
        assert len(task.parts()) == len(objectives(task)) == parts
    own = task_of("greedy-infomax-audio", modules=5, context_per_module=True)
    assert len(contexts(own)) == 5
    assert all(objective.context_channels == 8 for objective in objectives(own))
    only = task_of("greedy-infomax-audio", train_module=2, resume_from="before")
    assert (only.model.frozen, len(only.parts())) == (2, 1)
    piped = task_of("greedy-infomax-audio", pipeline=True)
    assert piped.config.pipeline
    assert {objective.gather_negatives for objective in objectives(piped)} == {"none"}


def test_modules_learn_from_their_own_loss_alone():
    task = task_of("greedy-infomax-audio")
    waveforms, speakers = batch_of(task)
    streams, handed = RandomStreams(0, CPU), Handover(waveforms)
    for index, part in enumerate(task.parts()):
        values, handed = part(handed, speakers, streams)
        values["loss"].backward()
        learnt = [name for name, each in task.model.named_parameters() if each.grad is not None]
        assert {name.split(".")[2] for name in learnt if name.startswith("encoder")} == {
            str(layer) for layer in range(min(index + 1, 5))
        }
        assert not handed.features.requires_grad
    assert all(parameter.grad is not None for parameter in task.model.parameters())


def test_a_module_draws_the_same_whoever_trains_those_before_it():
    """As in a pipeline, where each process has one part and the features of the one before."""
    task = task_of("greedy-infomax-audio")
    waveforms, speakers = batch_of(task)
    streams, handed, losses, inputs = RandomStreams(3, CPU), Handover(waveforms), [], []
    for part in task.parts():
        inputs.append(handed.features)
        values, handed = part(handed, speakers, streams)
        losses.append(values["loss"].item())
    for part, features, loss in zip(task.parts(), inputs, losses, strict=True):
        values, _ = part(Handover(features), speakers, RandomStreams(3, CPU))
        assert values["loss"].item() == loss


@pytest.mark.parametrize("model", MODELS)
def test_probe_every(model):
    for updates in (None, 5):
        task = task_of(model, dataset_of(test=recordings(6)), probe_every=updates)
        task.prepare(Ranks(CPU), resumed=False)
        assert (task.observe_every, task.observe_start) == (updates, updates is not None)
        assert list(task.observe(0, None)) == ([] if updates is None else ["knn_accuracy", "effective_rank"])


@pytest.mark.parametrize("model", MODELS)
def test_guessing_among_all_encodings(model):
    """The encodings of the batch, or of this process's part of it; nothing is drawn for it, as of weights."""
    task = task_of(model, sampling="all", gather_negatives="none")
    state = torch.get_rng_state()
    keys = math.exp(task.guesses[-1]["loss"])
    assert keys == pytest.approx(task.config.optimization.batch_size * task.window_frames)
    task.share = BatchShare(0, 2)
    assert math.exp(task.guesses[-1]["loss"]) == pytest.approx(keys / 2)
    assert torch.equal(torch.get_rng_state(), state)


def among_own_speaker(of):
    """Return the mean of of(n), n being the number of a speaker's own windows in a batch of 4.

    The batch is drawn from 4 of the speaker's windows and 4 others, and contains at least one of the former.
    """
    ways = {own: math.comb(3, own - 1) * math.comb(4, 4 - own) for own in range(1, 5)}
    return sum(count * of(own) for own, count in ways.items()) / math.comb(7, 3)


@pytest.mark.parametrize("windows", ["recordings", "same-speaker"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampling": "all"},
        {"sampling": "permuted"},
        {"sampling": "permuted", "reduction": "sum"},
        {"sampling": "offsets"},
        {"sampling": "shifted", "exclude_positive": True},
        {"sampling": "same-sequence"},
    ],
)
def test_guessing_among_encodings_of_the_speaker(windows, options):
    """A model guesses among those keys, drawn ones or all, that are of the same speaker's windows."""
    task = task_of(same_speaker=True, windows=windows, **options)
    frames, drawn = task.window_frames, 4

    def of_drawn(of, own):
        # Never an own one: the next three where it is said so, and with offsets the positive.
        never = 3 if options.get("exclude_positive") else int(options["sampling"] == "offsets")
        share = (own * (frames - 1) - never) / (4 * (frames - 1) - never)
        share = 1 if options["sampling"] == "same-sequence" or own == 4 else share
        chances = [math.comb(drawn, n) * share**n * (1 - share) ** (drawn - n) for n in range(drawn + 1)]
        return sum(chance * of(1 + n) for n, chance in enumerate(chances))

    for name, of in (("loss", math.log), ("accuracy", lambda keys: 1 / keys)):

        def found(own, of=of):
            return of(own * frames) if options["sampling"] == "all" else of_drawn(of, own)

        expected = among_own_speaker(found)
        if windows == "same-speaker":
            # What is left of a speaker makes a smaller batch, of which fewer encodings are contrasted.
            sizes = [len(starts) for starts in task.sampler(4, seed=0, rank=0, world_size=1)]
            expected = sum(size * found(size if options["sampling"] == "all" else 4) for size in sizes) / sum(sizes)
        expected *= 3 if (name, options.get("reduction")) == ("loss", "sum") else 1
        assert task.guess[name] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"modules": 6}, {"modules": 5}, {"modules": 1}, {"modules": 6, "train_module": 1, "resume_from": "before"}],
)
def test_each_module_guesses_among_its_own_encodings(options):
    task = task_of("greedy-infomax-audio", sampling="all", **options)
    frames = [WaveformEncoder.frames(task.model.encoder, WINDOW, layers=layers) for layers in (1, 2, 3, 4, 5, 5)]
    learning = [frames[-1:], None, None, None, frames[:5], frames][options["modules"] - 1]
    learning = [frames[1]] if "train_module" in options else learning
    assert [guess["loss"] for guess in task.guesses] == pytest.approx([math.log(4 * count) for count in learning])
    assert task.guess["loss"] == pytest.approx(np.mean([math.log(4 * count) for count in learning]))
    assert task.guess["accuracy"] == pytest.approx(np.mean([1 / (4 * count) for count in learning]))
    ends = [""] if len(learning) == 1 else [f"_module_{module}" for module in range(len(learning))]
    record = {"step": 1, **{f"{name}{end}": 0.5 for name in ("loss", "accuracy") for end in ends}}
    axes = task._curves([record], None).axes[0]
    levels = {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata())}
    assert levels == {guess["loss"] for guess in task.guesses}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_learns_nothing_says_so(model):
    assert_guessing_is_told(task_of(model))


def test_a_first_recording_that_is_too_short_says_nothing_of_the_model():
    task = task_of("cpc-audio")
    examples = task.examples
    lengths = np.diff(examples.starts)
    silent = np.zeros(400, np.int16)  # A frame or two.
    task.examples = replace(
        examples,
        samples=np.concatenate([silent, examples.samples]),
        starts=np.concatenate([[0], 400 + examples.starts]),
        names=("short", *examples.names),
        speakers=None,
        phones=None,
        phone_starts=None,
    )
    assert lengths.min() > 400
    assert task.trouble({"loss": 0.0, "accuracy": 1.0}) is None


def test_every_option_is_tried():
    names = {
        name
        for model in MODELS
        for section, field in registry.config_class(model).model_fields.items()
        if section in SECTIONS
        for name in field.annotation.model_fields
    }
    tried = {
        *OF_OBJECTIVE,
        *("probe_every", "dropout", "window", "windows", "cross_borders", "recipe", "keep_state"),
        *("channels", "padding", "norm", "normalization", "context", "context_channels", "context_layers"),
        *("backprop_through_time", "modules", "context_per_module", "train_module", "pipeline"),
    }
    assert names == tried, f"{', '.join(map(option, names ^ tried))} needs a test here that fails when it does nothing"


@pytest.mark.parametrize("model", MODELS)
def test_model_is_the_one_named_and_learns(model):
    task = task_of(model)
    assert type(task.model) is {"cpc-audio": CPC, "greedy-infomax-audio": GreedyInfoMax}[model]
    optimizer = torch.optim.Adam(task.model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = step(task)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("model", MODELS)
def test_steps_draw_from_the_streams_of_the_run_alone(model):
    task = task_of(model)
    batch, losses = batch_of(task), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(task.losses(*batch, RandomStreams(5, CPU))["loss"].item())
    assert losses[0] == losses[1]
    assert task.losses(*batch, RandomStreams(6, CPU))["loss"].item() != losses[0]


def test_a_kept_state_goes_on_from_a_checkpoint():
    options = {"keep_state": True, "windows": "sequential", "window": 3200, "context": "lstm"}
    task, resumed = task_of(**options), task_of(**options)
    step(task)
    carried = {name: value.clone() for name, value in task.carried().items()}
    assert len(carried) == 2  # What an LSTM has.
    assert {len(value) for value in carried.values()} == {len(task.model.context.state[0][0][0])}
    resumed.carry_on(carried)
    assert step(task)["loss"].item() == step(resumed)["loss"].item()
    assert step(task_of(**options))["loss"].item() != step(task)["loss"].item()


@pytest.mark.parametrize("model", MODELS)
def test_frames_of_a_recording(model):
    task = task_of(model)
    samples = torch.from_numpy(np.array(task.examples.recording(3)))
    names = [layer.name for layer in task.layers(task.model)]
    assert names[-2:] == ["encoder", "context"]
    for name in names:
        frames, centers = task.frames(task.model, name)(samples)
        encoded = task.model.encodings_by_module(samples[None, None])[names.index(name)] if "module" in name else None
        if encoded is None:
            assert len(frames) == len(centers) == task.model.encoder.frames(len(samples))
            assert centers[1] - centers[0] == 160
    frames, _ = task.frames(task.model)(samples)
    again, _ = task.frames(task.model)(samples)
    assert torch.equal(frames, again)
    expected = task.model.contextualize(task.model.encode(samples[None, None]))[0].t()
    torch.testing.assert_close(frames, expected.detach())
    assert len(task.frames(task.model)(samples[:3])[0]) == 0
    with pytest.raises(ValueError, match="layer: expected one of"):
        task.frames(task.model, "nothing")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
def test_frames_of_a_long_recording_need_little_memory(model, norm, monkeypatch):
    """It is encoded in pieces, of which the frames are those of the whole; instance norm needs it whole."""
    task = task_of(model, norm=norm, precision="fp32")
    samples = torch.from_numpy(np.array(task.examples.recording(3)))
    heard = []
    task.model.encoder.layers[0].register_forward_pre_hook(lambda layer, given: heard.append(given[0].shape[2]))
    for layer in task.layers(task.model):
        monkeypatch.setattr(speech_task, "_PIECE_SAMPLES", 10**9)
        whole, centers = task.frames(task.model, layer.name)(samples)
        heard.clear()
        monkeypatch.setattr(speech_task, "_PIECE_SAMPLES", 3200)
        frames, same_centers = task.frames(task.model, layer.name)(samples)
        torch.testing.assert_close(frames, whole)
        assert torch.equal(centers, same_centers)
        assert sum(heard) >= len(samples)
        assert max(heard) == len(samples) if norm == "instance" else max(heard) < 3200 + 3 * 465


@pytest.mark.parametrize(("rest", "frames"), [(40, 80), (110, 80), (400, 83)])
def test_a_transformers_last_window_may_be_of_one_frame(rest, frames):
    """Instance norm has no variance of one, which is left out."""
    task = task_of(context="transformer", context_channels=8, norm="instance")
    samples = torch.from_numpy(np.array(task.examples.samples[: 2 * WINDOW + rest]))
    found, centers = task.frames(task.model)(samples)
    assert len(found) == len(centers) == frames
    assert found.isfinite().all()


@pytest.mark.parametrize(("padding", "modules"), [("greedy-infomax", 6), ("cpc-audio", 5), ("cpc-audio", 1)])
def test_every_layers_frames_are_where_they_listen(padding, modules):
    """Frame i of a layer is centred in the samples that it depends on, which lie 5 to 160 from those of frame i + 1."""
    task = task_of("greedy-infomax-audio", padding=padding, modules=modules)
    encoder = task.model.encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.abs_().add_(0.1)  # No ReLU cuts anything off.
    samples = torch.from_numpy(np.array(task.examples.recording(0)))
    layers = [layer for layer in task.layers(task.model) if layer.name != "context"]
    assert len(layers) == min(modules, 5)
    for layer in layers:
        waveform = samples[None, None].float().abs().div(2**15).requires_grad_()
        made = layer.encode(waveform)
        _, centers = task.frames(task.model, layer.name)(samples)
        assert len(centers) == made.shape[2]
        for frame in (len(centers) // 3, len(centers) // 3 + 1):
            (gradient,) = torch.autograd.grad(made[0, :, frame].sum(), waveform, retain_graph=True)
            heard = gradient[0, 0].nonzero()[:, 0]
            assert abs((heard.min() + heard.max()).item() / 2 - centers[frame].item()) <= 0.5


def test_an_early_layers_probes_hear_the_phone_that_they_are_asked_for():
    """A module whose frames tell how loud it is every 5 samples tells loud phones from quiet ones."""
    waveforms = recordings(6)
    loud = (np.concatenate([waveforms.phones_of(index) for index in range(6)]) % 2).astype(np.int64)
    places = np.searchsorted(waveforms.phone_starts, np.arange(len(loud)), side="right") - 1
    sound = np.zeros_like(waveforms.samples)
    for label, recording, number in zip(loud, places, range(len(loud)), strict=True):
        begin = waveforms.starts[recording] + 160 * (number - waveforms.phone_starts[recording]) + 120
        sound[begin : begin + 160] = 20000 * label
    dataset = dataset_of(*[replace(waveforms, samples=sound, phones=loud.astype(np.uint8))] * 2)
    task = task_of("greedy-infomax-audio", dataset)
    for layer in task.layers(task.model):
        frames = RecordingFrames.of(dataset.train, task.frames(task.model, layer.name))
        features, phones, counts = frames.aligned()
        assert len(features) == len(phones) == sum(counts)
        # One frame a label, but for one at an edge.
        labels = [label_count(samples) for samples in np.diff(waveforms.starts)]
        assert all(there - 2 <= count <= there for there, count in zip(labels, counts, strict=True))
        # No more are kept, of what may be 32 times as many; a recording as a whole is that of all.
        assert all(len(kept) <= there + 2 for there, kept in zip(labels, frames.frames, strict=True))
        every, _ = task.frames(task.model, layer.name)(torch.from_numpy(np.array(dataset.train.recording(1))))
        assert torch.equal(frames.summaries("mean")[1], every.mean(0))
        assert torch.equal(frames.summaries("last")[1], every[-1])
        if layer.name == "module0":
            assert phone_probe(frames, frames, classes=2).accuracy > 0.99


def test_layers_below_a_transformer_hear_a_recording_whole():
    """In windows, the end of one would hear zeros in place of what comes next."""
    task = task_of("greedy-infomax-audio", context="transformer")
    samples = torch.from_numpy(np.array(task.examples.recording(0)))
    for number in range(4):
        frames, centers = task.frames(task.model, f"module{number}")(samples)
        expected = task.model.encodings_by_module(samples[None, None])[number]
        torch.testing.assert_close(frames, expected[0].t().detach())
        assert (centers.diff() > 0).all()


def test_a_kept_state_is_no_matter_to_frames():
    task = task_of(keep_state=True, windows="sequential", window=3200)
    samples = torch.from_numpy(np.array(task.examples.recording(0)))
    before, _ = task.frames(task.model)(samples)
    step(task)
    assert torch.equal(task.frames(task.model)(samples)[0], before)
    assert task.model.context.keep_state
    assert task.model.context.state is not None


def test_a_transformer_takes_a_recording_window_by_window():
    task = task_of(context="transformer")
    task.model.eval()
    samples = torch.from_numpy(np.array(task.examples.recording(0)))
    frames, centers = task.frames(task.model)(samples)
    first = task.model.contextualize(task.model.encode(samples[None, None, :WINDOW]))
    torch.testing.assert_close(frames[: first.shape[2]], first[0].t().detach(), atol=1e-5, rtol=1e-4)
    assert (centers.diff() > 0).all()
    assert centers[-1] > len(samples) - 400


def test_what_a_model_is_worth():
    results = task_of(dataset=dataset_of(test=recordings(6))).evaluate()
    names = {f"{model}{what}_accuracy" for model in ("", "untrained_", "log_mel_") for what in ("phone", "speaker")}
    assert set(results) == {*names, "chance_phone_accuracy"}
    assert all(0 <= value <= 1 for value in results.values())
    # Spectra tell nearly all of tones and of loudness.
    assert results["log_mel_phone_accuracy"] > 0.9 > results["chance_phone_accuracy"]
    assert results["log_mel_speaker_accuracy"] == 1
    assert results["phone_accuracy"] == results["untrained_phone_accuracy"]


def test_speakers_are_not_told_by_what_one_of_them_says(monkeypatch):
    """Where recordings are so long that a run's probes learn from one."""
    monkeypatch.setitem(speech_task._PROBE_SECONDS, "train", 1.0)
    with pytest.warns(UserWarning, match=r"probes learn from are of one speaker, so telling speakers is not tested"):
        results = task_of(dataset=dataset_of(test=recordings(6))).evaluate()
    assert {name for name in results if "speaker" in name} == set()
    assert results["log_mel_phone_accuracy"] > 0.5


def test_what_is_not_labelled_is_not_told():
    plain = recordings(labelled=False)
    assert task_of(dataset=SpeechDataset("voices", plain, plain)).evaluate() == {}
    assert task_of(dataset=SpeechDataset("voices", plain, None)).evaluate() == {}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_saved(model, tmp_path):
    task = task_of(model, dataset=dataset_of(test=recordings(4, 3.0)))
    run = RunDir(tmp_path)
    log = RunLog(run, after_step=0)
    suffixes = [""] if len(task.parts()) == 1 else ["", *(f"_module_{part}" for part in range(len(task.parts())))]
    for number in (1, 2):
        log.log({"step": number, **{f"{name}{end}": 1.0 for end in suffixes for name in ("loss", "accuracy")}})
    log.close()
    task.save(run)
    with safe_open(run.encoder, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict.
    assert metadata["class"] == "WaveformEncoder"
    assert json.loads(metadata["encoder"])["channels"] == 8
    for part in ("encoder", "context"):
        for name, value in getattr(task.model, part).state_dict().items():
            assert torch.equal(weights[f"{part}.{name}"], value)
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "frames.png"}


def test_recordings_of_a_probe_come_from_all_of_the_set():
    waveforms = recordings(8)
    assert len(speech_task.probed_recordings(waveforms, 1e9)) == 8
    few = speech_task.probed_recordings(waveforms, 4.0)
    assert 2 <= len(few) <= 4
    assert set(waveforms.speakers[few]) == {0, 1}
    assert len(speech_task.probed_recordings(waveforms, 0.0)) == 1


def test_recordings_with_phones_are_among_those_of_a_probe():
    """Where few are labelled, those that are taken at equal distances might all be without."""
    full = recordings(40)
    for number in (7, 22):
        counts = np.where(np.arange(40) == number, np.diff(full.phone_starts), 0)
        few = replace(full, phones=full.phones_of(number), phone_starts=np.append(0, np.cumsum(counts)))
        assert set(speech_task.probed_recordings(few, 8.0)) == {number, *speech_task.probed_recordings(full, 8.0)}
        results = task_of(dataset=dataset_of(few, few)).evaluate()
        assert results["log_mel_phone_accuracy"] > 0.9


def test_recipes_are_defaults():
    librispeech = ["--model", "cpc-audio", "--dataset", "librispeech", "--data-dir", "x"]
    original, modified = (parse([*librispeech, "--recipe", name]).run for name in ("original", "modified"))
    assert parse(librispeech).run == original
    assert (original.prediction.recipe, original.context.context, original.encoder.norm) == ("original", "gru", "none")
    assert (modified.prediction.recipe, modified.context.context, modified.encoder.norm) == (
        "modified",
        "lstm",
        "channel",
    )
    assert (modified.prediction.neg_samples, modified.prediction.sampling) == (128, "shifted")
    # Presets for runs of minutes have a norm in both recipes.
    assert parse(["--model", "cpc-audio"]).run.encoder.norm == "channel"
    given = parse(["--model", "cpc-audio", "--recipe", "modified", "--neg-samples", "5", "--context", "gru"]).run
    assert (given.prediction.neg_samples, given.context.context) == (5, "gru")
    assert type(task_class("cpc-audio")(modified, dataset_of(recordings(8, 2.0)), CPU).model) is CPC


def test_a_recipe_does_not_change_an_earlier_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(parse(["--model", "cpc-audio"]).run.to_yaml())
    path = str(tmp_path / "config.yaml")
    assert parse(["--config", path, "--recipe", "original"]).run.prediction.recipe == "original"
    with pytest.raises(TrainingError, match="--recipe modified chooses the defaults of a new run"):
        parse(["--config", path, "--recipe", "modified"])
    with pytest.raises(SystemExit):
        parse(["--model", "cpc-audio", "--recipe", "third"])
    assert "--recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pred_steps": 40}, "--pred-steps 40 reaches past --window 6400, which has 40 frames"),
        ({"keep_state": True}, "--keep-state needs --windows sequential"),
        ({"keep_state": True, "windows": "sequential", "context": "transformer"}, "--keep-state is for recurrent"),
        ({"context": "lstm", "backprop_through_time": False}, "--no-backprop-through-time is for --context gru"),
        ({"context": "transformer", "context_channels": 4}, "--context-channels must be 8, got 4"),
        ({"predictor": "transformer", "context_channels": 16}, "--predictor transformer needs as many"),
        ({"exclude_positive": True}, "--exclude-positive is for --sampling shifted"),
        ({"gather_negatives": "ring"}, "--gather-negatives ring needs --sampling all"),
        ({"subsample": 3}, "--subsample 3 leaves none"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises((OptionError, ValueError), match=words):
        config_of(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_module": 6}, "--train-module 6: there are 6 modules"),
        ({"context_per_module": True}, "--context-per-module needs --modules 5"),
        ({"pipeline": True, "modules": 1}, "--pipeline trains several modules"),
        ({"train_module": 1}, "--train-module 1 needs --resume-from"),
    ],
)
def test_modules_that_do_not_go_together(options, words):
    with pytest.raises((OptionError, ValueError), match=words):
        config_of("greedy-infomax-audio", **options)


@pytest.mark.parametrize(("model", "dataset"), [("cpc-audio", "textures"), ("cpc-v1", "voices")])
def test_a_model_takes_its_own_medium(model, dataset, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--model", model, "--dataset", dataset])
    assert ended.value.code == 2
    assert f"error: --dataset {dataset} has no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"same_speaker": True}, "--same-speaker: the speakers of voices are not known"),
        ({"windows": "same-speaker"}, "--windows: same-speaker: the speakers of voices are not known"),
        ({"window": 17_200}, "--window: expected at most 17120 samples, got 17200"),
        ({"batch_size": 9}, "--batch-size: expected at most 8 recordings windows, got 9"),
    ],
)
def test_options_that_recordings_do_not_fit(options, words, tmp_path):
    task = task_of(dataset=SpeechDataset("voices", recordings(labelled=False), None), **options)
    with pytest.raises(TrainingError, match=f"^{words}$"):
        Trainer(task, task.config, RunDir(tmp_path), Ranks(CPU))


def test_a_model_learns_from_what_has_no_labels():
    few, many = (WaveformSet(np.zeros(n, np.int16), np.array([0, n]), ["1"]) for n in (40_000, 80_000))
    assert task_of(dataset=SpeechDataset("voices", few, None)).examples is few
    assert task_of(dataset=SpeechDataset("voices", few, None, unlabeled=many)).examples is many
