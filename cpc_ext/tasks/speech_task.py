"""The common part of the tasks on speech: batches of windows, features of whole recordings, and linear probes.

A trained model is judged by how well linear classifiers find phones and speakers from its contexts. It is compared with
the same model untrained, whose weights follow from the seed, and with log-mel spectra.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Binomial

from cpc_ext import __version__, figures
from cpc_ext.data import SAMPLE_RATE, SpeechDataset, WaveformFetcher, WaveformSet, WindowSampler
from cpc_ext.data.notice import tell
from cpc_ext.measures.frames import label_centers
from cpc_ext.measures.log_mel import log_mel
from cpc_ext.measures.speech_frames import (
    FrameMaker,
    RecordingFrames,
    log_mel_frames,
    phone_probe,
    speaker_probe,
)
from cpc_ext.models import CPC, CausalTransformerContext, GreedyInfoMax, RecurrentContext, WaveformEncoder
from cpc_ext.models.contexts.recurrent_context import State
from cpc_ext.models.encoders.waveform_encoder import KERNELS
from cpc_ext.tasks.encoder_task import guessing
from cpc_ext.tasks.online_probe import FrameProbe, probe_curve, probed_recordings
from cpc_ext.tasks.speech_options import SpeechConfig
from cpc_ext.tasks.trouble import trouble
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.precision import autocast
from cpc_ext.training.random_streams import RandomStreams, seeded
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.safetensors_file import write_safetensors
from cpc_ext.training.task import Fetcher, Task

__all__ = ["FeatureLayer", "SpeechTask", "probed_recordings"]

# Seconds of recordings for training and testing a run's own probes: enough to compare models, in a minute or two.
_PROBE_SECONDS = {"train": 900.0, "test": 450.0}
# How much of a recording a figure shows.
_SHOWN_SECONDS = 2.5
# Number of recordings whose encodings are checked for being all alike.
_WATCHED_RECORDINGS = 8
# Samples of a recording that are encoded at a time: a minute.
_PIECE_SAMPLES = 60 * SAMPLE_RATE
# Number of batches in which windows of the same speaker are counted.
_WATCHED_BATCHES = 200


class FeatureLayer(NamedTuple):
    """A layer whose outputs are features.

    name: the layer's name for users. encode: maps waveforms [1, 1, T] to encodings [1, D, L].
    convolutions: number of the encoder's convolutions up to this layer, which decide where its frames are centred.
    context: maps encodings to features [1, E, L]; None if the encodings are the features.
    windowed: whether the layer takes at most one window at a time.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    convolutions: int = len(KERNELS)
    context: Callable[[Tensor], Tensor] | None = None
    windowed: bool = False


class SpeechTask(Task):
    """The task of training a model of speech, judged by linear classifiers of its contexts.

    Raises:
        ValueError: recordings too short for the windows.
    """

    model: CPC | GreedyInfoMax
    examples: WaveformSet
    unit = "windows"

    def __init__(self, config: SpeechConfig, dataset: SpeechDataset, device: torch.device) -> None:
        self._config = config
        self._dataset = dataset
        self._device = device
        self.examples = dataset.pretrain
        self.observe_every = config.probe.probe_every
        self.observe_start = self.observe_every is not None
        self._probe: FrameProbe | None = None
        self.model = self.initial_model()

    @abstractmethod
    def _build(self) -> CPC | GreedyInfoMax:
        """Build a new model on the CPU; PyTorch's default generator draws the weights."""

    @abstractmethod
    def layers(self, model: Any) -> list[FeatureLayer]:
        """Return the layers whose outputs are features, first to last.

        model: a model of this task.
        """

    @property
    def config(self) -> SpeechConfig:
        """The run's config."""
        return self._config

    def initial_model(self) -> CPC | GreedyInfoMax:
        """Build the model with the initial weights of the config's seed."""
        with seeded(self._config.compute.seed):
            return self._build().to(self._device)

    def sampler(self, batch_size: int, *, seed: int, rank: int, world_size: int) -> WindowSampler:
        view = self._config.view
        if self.examples.speakers is None:
            unknown = f"the speakers of {self._dataset.name} are not known"
            if view.windows == "same-speaker":
                raise ValueError(f"windows: same-speaker: {unknown}")
            if self._config.prediction.same_speaker:
                raise ValueError(f"same_speaker: {unknown}")
        return WindowSampler(
            self.examples,
            batch_size,
            window=view.window,
            kind=view.windows,
            cross_borders=view.cross_borders,
            seed=seed,
            # The windows of one recording or speaker seldom fill a batch, so partial batches are kept. Several ranks
            # need equal shares of a batch, so theirs are always full.
            drop_last=world_size > 1 or view.windows not in ("same-speaker", "same-sequence"),
            rank=rank,
            world_size=world_size,
        )

    def fetcher(self, device: torch.device, streams: RandomStreams) -> Fetcher:
        return WaveformFetcher(self.examples, device, self._config.view.window)

    def prepare(self, ranks: Ranks, *, resumed: bool) -> None:
        if self.observe_every is not None:
            self._probe = FrameProbe(self._dataset)

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        return {} if self._probe is None else self._probe.found(self.frames(self.model))

    def speakers(self, labels: Tensor | None) -> Tensor | None:
        """Return a batch's speakers if the objective contrasts within speakers, else None."""
        return labels if self._config.prediction.same_speaker else None

    def carried(self) -> dict[str, Tensor]:
        """Return the kept states of recurrent contexts, [B, 1, E] each."""
        return {
            f"state.{name}.{layer}.{part}": value.transpose(0, 1)
            for name, context in _recurrent(self.model)
            for layer, state in enumerate(context.state or ())
            for part, value in enumerate((state,) if isinstance(state, Tensor) else state)
        }

    def carry_on(self, carried: dict[str, Tensor]) -> None:
        for name, context in _recurrent(self.model):
            if not context.keep_state:
                continue
            found: list[State] = []
            while f"state.{name}.{len(found)}.0" in carried:
                parts = [carried.get(f"state.{name}.{len(found)}.{part}") for part in range(2)]
                first, *rest = (
                    part.transpose(0, 1).contiguous().to(self._device) for part in parts if part is not None
                )
                found.append((first, rest[0]) if rest else first)
            context.state = found or None

    # --- Evaluation ---

    def frames(self, model: CPC | GreedyInfoMax, layer: str | None = None) -> FrameMaker:
        """Return a function from a whole recording, int16 [samples], to features, float32 [L, D], and frame centres.

        A recurrent context begins with zeros; a transformer takes a recording window by window. A long recording is
        encoded in pieces, as the first layers' output takes some hundred times as much memory as its samples.

        Args:
            model: a model of this task.
            layer: name of a layer out of :meth:`layers`; None takes the last.

        Raises:
            ValueError: no such layer.
        """
        named = {each.name: each for each in self.layers(model)}
        if layer is not None and layer not in named:
            raise ValueError(f"layer: expected one of {', '.join(named)}, got {layer!r}")
        _, encode, convolutions, context, windowed = named[list(named)[-1] if layer is None else layer]
        encoder = model.encoder
        assert isinstance(encoder, WaveformEncoder)

        def make(waveform: Tensor) -> Tensor:
            parts = encoder.pieces(waveform.shape[2], _PIECE_SAMPLES, layers=convolutions)
            encodings = [encode(waveform[:, :, part])[:, :, kept] for part, kept in parts]
            whole = torch.cat(encodings, 2) if len(encodings) > 1 else encodings[0]
            return whole if context is None else context(whole)

        @torch.no_grad()
        def frames(samples: Tensor) -> tuple[Tensor, Tensor]:
            waveform = samples.to(self._device).view(1, 1, -1)
            if encoder.frames(waveform.shape[2]) < encoder.least_frames:
                return torch.empty(0, 0), torch.empty(0)
            with _resting(model), autocast(self._device, self._config.compute.precision):
                pieces = waveform.split(self._config.view.window, 2) if windowed else [waveform]
                pieces = [piece for piece in pieces if encoder.frames(piece.shape[2]) >= encoder.least_frames]
                made = [make(piece)[0] for piece in pieces]
            centers = [
                encoder.frame_centers(each.shape[1], layers=convolutions) + number * self._config.view.window
                for number, each in enumerate(made)
            ]
            return torch.cat(made, 1).t().float().cpu(), torch.cat(centers)

        return frames

    def evaluate(self) -> dict[str, float]:
        """Return accuracies of linear probes of phones and speakers: trained model, untrained model, log-mel spectra.

        The result is empty if the data set has no test recordings, or no labels.
        """
        train, test = self._dataset.train, self._dataset.test
        if test is None:
            return {}
        chosen = [probed_recordings(train, _PROBE_SECONDS["train"]), probed_recordings(test, _PROBE_SECONDS["test"])]
        told = train.speakers is not None and test.speakers is not None and len(self._dataset.speakers) > 1
        if told and len(np.unique(train.known_speakers[chosen[0]])) < 2:
            told = False
            where = f"the {_PROBE_SECONDS['train'] / 60:g} minutes that a run's probes learn from are of one speaker"
            tell(self._dataset.name, [f"{where}, so telling speakers is not tested; evaluate --minutes takes more"])
        results: dict[str, float] = {}
        makers = {
            "": self.frames(self.model),
            "untrained_": self.frames(self.initial_model()),
            "log_mel_": log_mel_frames(),
        }
        for name, make in makers.items():
            both = [RecordingFrames.of(each, make, some) for each, some in zip((train, test), chosen, strict=True)]
            if train.phones is not None and test.phones is not None:
                probe = phone_probe(*both, classes=len(self._dataset.phone_names))
                results[f"{name}phone_accuracy"] = probe.accuracy
                results["chance_phone_accuracy"] = probe.majority
            if told:
                results[f"{name}speaker_accuracy"] = speaker_probe(*both, speakers=len(self._dataset.speakers))
        return results

    def description(self) -> dict[str, Any]:
        return {"sample_rate": self._dataset.sample_rate}

    def save(self, run: RunDir) -> None:
        """Write the figures, and the weights of encoder and context in a file whose header says how to build them.

        If modules follow the last one that the run trained, the header's "modules" is the number of modules up to that
        one; those that follow have the weights that they had at the run's start.
        """
        weights = {
            f"{part}.{name}": value.contiguous()
            for part in ("encoder", "context")
            if isinstance(module := getattr(self.model, part), nn.Module)
            for name, value in module.state_dict().items()
        }
        options = self._config
        metadata = {
            "format": "pt",
            "cpc_ext": __version__,
            "class": WaveformEncoder.__name__,
            "encoder": json.dumps(waveform_encoder_arguments(options)),
            "context": json.dumps(options.context.model_dump(mode="json")),
            "config": json.dumps(options.model_dump(mode="json")),
        }
        if options.trained_modules is not None:
            metadata["modules"] = str(options.trained_modules)
        with atomic_file(run.encoder) as file:
            write_safetensors(file, weights, metadata)
        self._save_figures(run)

    def trouble(self, means: dict[str, float]) -> str | None:
        # The first recording alone may be of a single sound, or too short for a frame.
        count = min(len(self.examples), _WATCHED_RECORDINGS)
        most = int(_SHOWN_SECONDS * self._dataset.sample_rate) // count
        make = self.frames(self.model)
        parts = [torch.from_numpy(np.array(self.examples.recording(index)[:most])) for index in range(count)]
        return trouble(means, self.guess, torch.cat([make(part)[0] for part in parts]), self._config)

    @property
    def guess(self) -> dict[str, float]:
        """Loss and accuracy of guessing, averaged over the modules that learn."""
        guesses = self.guesses
        return {name: sum(guess[name] for guess in guesses) / len(guesses) for name in guesses[0]}

    @property
    def guesses(self) -> list[dict[str, float]]:
        """Loss and accuracy of guessing for each module that learns; a single entry for a model without modules."""
        return self._guesses([self.window_frames])

    def _guesses(self, frames: Sequence[int]) -> list[dict[str, float]]:
        """Return loss and accuracy of guessing for each module, given its number of encodings in a window."""
        options = self._config.prediction
        windows = self.contrasted(self._config.optimization.batch_size, options.gather_negatives)
        alike = self._windows_alike(windows) if options.same_speaker else {(windows, windows): 1}
        guesses = []
        for count in frames:
            keys: list[int] = []
            weights: list[float] = []
            for (own, every), times in alike.items():
                if options.sampling == "all":
                    found = {own * count: 1.0}
                elif own == every or options.sampling == "same-sequence":
                    found = {options.neg_samples + 1: 1.0}
                else:
                    # Number of the own windows' frames that are never drawn as negatives.
                    never = options.pred_steps if options.exclude_positive else int(options.sampling == "offsets")
                    share = (own * (count - 1) - never) / (every * (count - 1) - never)
                    found = {1 + drawn: p for drawn, p in enumerate(_binomial(options.neg_samples, share))}
                keys += found
                weights += [times * weight for weight in found.values()]
            guess = guessing(*keys, weights=weights)
            guess["loss"] *= options.pred_steps if options.reduction == "sum" else 1
            guesses.append(guess)
        return guesses

    def _windows_alike(self, batch_size: int) -> Counter[tuple[int, int]]:
        """Count the windows of the first batches by (windows of the same speaker in the batch, size of the batch).

        A window itself counts among those of its speaker.
        """
        found: Counter[tuple[int, int]] = Counter()
        with warnings.catch_warnings():
            # The sampler of the training has already warned of what it leaves out.
            warnings.simplefilter("ignore")
            sampler = self.sampler(batch_size, seed=self._config.compute.seed, rank=0, world_size=1)
        for starts in islice(chain.from_iterable(repeat(sampler)), _WATCHED_BATCHES):
            speakers = self.examples.speakers_at(starts)
            assert speakers is not None  # The sampler needs them.
            found.update((int(own), len(starts)) for own in (speakers[:, None] == speakers).sum(1))
        return found

    @property
    def window_frames(self) -> int:
        """Number of encodings of a window."""
        encoder = self.model.encoder
        assert isinstance(encoder, WaveformEncoder)
        return encoder.frames(self._config.view.window)

    @abstractmethod
    def _curves(self, metrics: list[dict[str, float]], probe: figures.ProbeCurve | None) -> Figure:
        """Draw the logged metrics, and the results of the probe during training."""

    def _save_figures(self, run: RunDir) -> None:
        metrics = read_metrics(run.metrics, having=("loss", "accuracy"))
        if metrics:
            figures.save(run.path / "curves.png", self._curves(metrics, probe_curve(run.metrics, self._probe)))
        test = self._dataset.test
        if test is None or not len(test) or test.phones is None:
            return
        index = max(map(int, probed_recordings(test, 0.0)), key=lambda index: len(test.phones_of(index)))
        samples = torch.from_numpy(np.array(test.recording(index)[: int(_SHOWN_SECONDS * self._dataset.sample_rate)]))
        spectrum = log_mel(samples)
        phones = test.phones_of(index)[: len(spectrum)]
        frames, centers = self.frames(self.model)(samples)
        if len(frames) > 1 and len(phones) > 1:
            figure = figures.spoken_frames(
                spectrum[: len(phones)].numpy(),
                phones,
                frames.numpy(),
                names=self._dataset.phone_names,
                label_centers=label_centers(len(phones)).numpy() / self._dataset.sample_rate,
                frame_centers=centers.numpy() / self._dataset.sample_rate,
                title=f"{test.names[index]}: spectrum, phones, and what the model makes of it",
            )
            figures.save(run.path / "frames.png", figure)


def waveform_encoder_arguments(config: SpeechConfig) -> dict[str, Any]:
    """Return the arguments of the config's encoder."""
    return config.encoder.model_dump(mode="json")


def waveform_encoder(config: SpeechConfig) -> WaveformEncoder:
    """Build the encoder; PyTorch's default generator draws the weights."""
    return WaveformEncoder(**waveform_encoder_arguments(config))


def sequence_context(config: SpeechConfig, channels: int, frames: int) -> RecurrentContext | CausalTransformerContext:
    """Build the context network of encodings with ``channels`` channels, in windows of ``frames`` frames."""
    options = config.context
    if options.context == "transformer":
        return CausalTransformerContext(channels, frames, layers=options.context_layers)
    return RecurrentContext(
        channels,
        options.context_channels,
        kind=options.context,
        layers=options.context_layers,
        keep_state=options.keep_state,
        remove_bptt=not options.backprop_through_time,
    )


def context_layers(context: nn.Module | None, encode: Callable[[Tensor], Tensor]) -> Iterable[FeatureLayer]:
    """Yield the layers of a context network as features of waveforms: "context1" and so on, the last "context"."""
    if not isinstance(context, RecurrentContext | CausalTransformerContext):
        return
    windowed = isinstance(context, CausalTransformerContext) and not context.absolute
    for layer in range(1, len(context.layers) + 1):
        name = "context" if layer == len(context.layers) else f"context{layer}"
        yield FeatureLayer(name, encode, context=partial(context, layer=layer), windowed=windowed)


def _recurrent(model: nn.Module) -> Iterator[tuple[str, RecurrentContext]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, RecurrentContext))


def _binomial(draws: int, share: float) -> list[float]:
    """Return the probabilities of 0, 1, ... hits in ``draws`` draws, each of which hits with probability ``share``."""
    counts = torch.arange(draws + 1, dtype=torch.float64)
    found: list[float] = Binomial(draws, torch.tensor(share, dtype=torch.float64)).log_prob(counts).exp().tolist()
    return found


@contextmanager
def _resting(model: CPC | GreedyInfoMax) -> Iterator[None]:
    """Put the model in evaluation mode, with recurrent contexts that begin with zeros; restore it afterwards."""
    training, kept = model.training, [(context, context.keep_state) for _, context in _recurrent(model)]
    model.eval()
    for context, _ in kept:
        context.keep_state = False
    try:
        yield
    finally:
        model.train(training)
        for context, keep in kept:
            context.keep_state = keep
