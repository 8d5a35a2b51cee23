"""Options of the models that learn from speech: what they hear of it, their networks, and what is predicted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cpc_ext.tasks.encoder_options import ContrastSection, ProbeSection
from cpc_ext.training.config import MOST, RunConfig, Section

__all__ = [
    "FRAME",
    "SequenceContextSection",
    "SequencePredictionSection",
    "SpeechConfig",
    "WaveformSection",
    "WindowSection",
]

# Samples from one encoding to the next.
FRAME = 160


class WindowSection(Section):
    """What the model hears in a step: windows of the recordings."""

    window: int = Field(20480, ge=10 * FRAME, le=2**24, description="Samples of a window, 16000 a second.")
    windows: Literal["recordings", "uniform", "same-speaker", "same-sequence", "sequential"] = Field(
        "recordings",
        description="Where the windows of a batch come from. recordings: a random window of every recording in an "
        "epoch; the others cut all sound into windows from a random offset on and take them from anywhere, from one "
        "speaker, from one recording, or in their order, each place of a batch going through a stretch of its own.",
    )
    cross_borders: bool = Field(
        True, description="Cut windows that hold the end of one recording and the beginning of the next."
    )


class WaveformSection(Section):
    """The encoder: five convolutions over the waveform, an encoding every 10 ms."""

    channels: int = Field(512, ge=1, le=MOST, description="Channels of every layer and of the encodings.")
    padding: Literal["greedy-infomax", "cpc-audio"] = Field(
        "greedy-infomax",
        description="Zeros around the input of the layers, which decide where the frames are centred: 2,2,2,2,1 of "
        "Greedy InfoMax or 3,2,1,1,1 of CPC_audio.",
    )
    norm: Literal["none", "channel", "batch", "instance"] = Field(
        "none", description="Normalisation after each convolution; channel: over the channels of each frame."
    )
    normalization: Literal["none", "greedy-infomax"] = Field(
        "greedy-infomax", description="What is done to samples in -1..1: nothing, or Greedy InfoMax's scale and shift."
    )


class SequenceContextSection(Section):
    """The context network, which summarises the encodings so far."""

    context: Literal["gru", "lstm", "rnn", "transformer"] = Field("gru", description="What sums up the past.")
    context_channels: int = Field(256, ge=1, le=MOST, description="Channels of a context.")
    context_layers: int = Field(1, ge=1, le=1000, description="Layers of the context network.")
    keep_state: bool = Field(
        False,
        description="Begin a window with the state in which the one before ended, without gradient to it; for "
        "--windows sequential.",
    )
    backprop_through_time: bool = Field(
        True, description="Let the gradient of a context reach the frames before it; without, only its own. For gru."
    )


class SequencePredictionSection(ContrastSection):
    """What is predicted, from what, and told from which other encodings."""

    pred_steps: int = Field(12, ge=1, le=10_000, description="Frames ahead that are predicted, nearest to farthest.")
    predictor: Literal["linear", "transformer", "ffd", "conv4", "conv8", "conv12", "lstm"] = Field(
        "linear", description="What predicts from the contexts, one for every step ahead; the published ones."
    )
    sampling: Literal["permuted", "offsets", "same-sequence", "shifted", "all"] = Field(
        "permuted",
        description="How negatives are drawn. permuted, offsets, same-sequence: methods 1, 0 and 2 of Greedy InfoMax; "
        "shifted: any window at another time, as in CPC_audio; all: every other encoding of the batch.",
    )
    neg_samples: int = Field(10, ge=1, le=2**20, description="Negatives of each prediction.")
    exclude_positive: bool = Field(
        False, description="Never draw what is predicted as a negative of it; for --sampling shifted."
    )
    same_speaker: bool = Field(False, description="Contrast only with encodings of the same speaker.")
    subsample: Annotated[int, Field(ge=2, le=2**24)] | None = Field(
        None,
        description="Frames that predict where a module has more: a random stretch of so many, the same in the whole "
        "batch. None: all.",
    )
    common_positions: bool = Field(
        False, description="Predict all steps ahead from the same frames, instead of from as many as each step has."
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="How the losses of the steps ahead make one.")
    score: Literal["dot", "mean"] = Field(
        "dot", description="Product of prediction and encoding: summed over the channels, or their mean."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of every prediction that is dropped.")

    def objective(self, frames: int) -> dict[str, Any]:
        """Return these options as arguments of an objective, for windows of ``frames`` frames."""
        return {**self.model_dump(include=set(SequencePredictionSection.model_fields)), "window": frames}

    @model_validator(mode="after")
    def _options_fit(self) -> SequencePredictionSection:
        if self.exclude_positive and self.sampling != "shifted":
            raise ValueError(f"--exclude-positive is for --sampling shifted, got --sampling {self.sampling}")
        if self.gather_negatives == "ring" and (self.sampling != "all" or self.same_speaker):
            raise ValueError("--gather-negatives ring needs --sampling all and no --same-speaker")
        if self.subsample is not None and self.subsample <= self.pred_steps:
            raise ValueError(f"--subsample {self.subsample} leaves none of --pred-steps {self.pred_steps} ahead")
        return self


class SpeechConfig(RunConfig):
    """A run that learns from speech."""

    probe: ProbeSection = Field(default_factory=ProbeSection)
    view: WindowSection = Field(default_factory=WindowSection)
    encoder: WaveformSection = Field(default_factory=WaveformSection)
    context: SequenceContextSection = Field(default_factory=SequenceContextSection)
    prediction: SequencePredictionSection

    @model_validator(mode="after")
    def _predictions_fit_window(self) -> SpeechConfig:
        frames = self.view.window // FRAME
        if self.prediction.pred_steps >= frames:
            raise ValueError(
                f"--pred-steps {self.prediction.pred_steps} reaches past --window {self.view.window}, which has "
                f"{frames} frames of {FRAME} samples"
            )
        if self.context.keep_state and self.view.windows != "sequential":
            raise ValueError("--keep-state needs --windows sequential: other windows do not follow one another")
        context = self.context
        if context.context != "gru" and not context.backprop_through_time:
            raise ValueError(f"--no-backprop-through-time is for --context gru, got --context {context.context}")
        if context.context == "transformer" and context.keep_state:
            raise ValueError("--keep-state is for recurrent contexts: --context transformer has no state")
        if context.context == "transformer" and context.context_channels != self.encoder.channels:
            raise ValueError(
                f"--context transformer has the encoder's channels: --context-channels must be "
                f"{self.encoder.channels}, got {context.context_channels}"
            )
        if self.prediction.predictor == "transformer" and context.context_channels != self.encoder.channels:
            raise ValueError(
                f"--predictor transformer needs as many --context-channels as --channels, {self.encoder.channels}, got "
                f"{context.context_channels}"
            )
        return self

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.prediction.sampling == "all":
            idle["neg_samples"] = "--sampling all takes every other encoding"
        if self.view.windows in ("recordings", "same-sequence"):
            idle["cross_borders"] = f"--windows {self.view.windows} takes windows inside of recordings"
        idle["channels_last"] = "sequences have no images' layout"
        return idle
