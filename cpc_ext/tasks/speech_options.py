"""Options of the models that learn from speech: their input, their networks, and the predictions."""

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
    """The model's input: windows of the recordings."""

    window: int = Field(
        20480,
        ge=10 * FRAME,
        le=2**24,
        description="Length of a window in samples, at 16000 samples per second.",
    )
    windows: Literal["recordings", "uniform", "same-speaker", "same-sequence", "sequential"] = Field(
        "recordings",
        description="Source of the windows of a batch. recordings: an epoch has one random window of every recording. "
        "The other choices cut all sound into windows, beginning at a random offset. The windows of a batch then come "
        "from anywhere (uniform), from one speaker (same-speaker) or from one recording (same-sequence); or each "
        "position of the batch goes through its own share of the sound in order (sequential).",
    )
    cross_borders: bool = Field(
        True, description="Allow windows that contain the end of one recording and the beginning of the next."
    )


class WaveformSection(Section):
    """The encoder: five convolutions over the waveform, with an encoding every 10 ms."""

    channels: int = Field(512, ge=1, le=MOST, description="Channels of every layer and of the encodings.")
    padding: Literal["greedy-infomax", "cpc-audio"] = Field(
        "greedy-infomax",
        description="Zero padding of the five layers, which determines where the frames are centred: 2,2,2,2,1 in "
        "Greedy InfoMax, 3,2,1,1,1 in CPC_audio.",
    )
    norm: Literal["none", "channel", "batch", "instance"] = Field(
        "none", description="Normalisation after each convolution; channel: over the channels of each frame."
    )
    normalization: Literal["none", "greedy-infomax"] = Field(
        "greedy-infomax",
        description="Normalisation of the samples, which are in -1..1: none, or Greedy InfoMax's scale and shift.",
    )


class SequenceContextSection(Section):
    """The context network, which summarises the encodings so far."""

    context: Literal["gru", "lstm", "rnn", "transformer"] = Field("gru", description="Type of the context network.")
    context_channels: int = Field(256, ge=1, le=MOST, description="Channels of a context.")
    context_layers: int = Field(1, ge=1, le=1000, description="Number of layers of the context network.")
    keep_state: bool = Field(
        False,
        description="Begin each window with the final state of the window before, detached from its graph. Needs "
        "--windows sequential.",
    )
    backprop_through_time: bool = Field(
        True,
        description="Propagate the gradient of a context back to the frames before it. With "
        "--no-backprop-through-time, which needs --context gru, it reaches only the context's own frame.",
    )


class SequencePredictionSection(ContrastSection):
    """The predictions, the predictor and the negatives."""

    pred_steps: int = Field(
        12, ge=1, le=10_000, description="Number of frames ahead to predict, from the nearest to the farthest."
    )
    predictor: Literal["linear", "transformer", "ffd", "conv4", "conv8", "conv12", "lstm"] = Field(
        "linear",
        description="Network that predicts encodings from contexts, a separate one for every step ahead. All choices "
        "are published ones.",
    )
    sampling: Literal["permuted", "offsets", "same-sequence", "shifted", "all"] = Field(
        "permuted",
        description="Sampling of negatives. permuted, offsets, same-sequence: methods 1, 0 and 2 of Greedy InfoMax; "
        "shifted: from any window at another time, as in CPC_audio; all: every other encoding of the batch.",
    )
    neg_samples: int = Field(10, ge=1, le=2**20, description="Number of negatives of each prediction.")
    exclude_positive: bool = Field(
        False,
        description="Never draw the frames that a context predicts as its negatives. Needs --sampling shifted.",
    )
    same_speaker: bool = Field(False, description="Use only negatives of the same speaker.")
    subsample: Annotated[int, Field(ge=2, le=2**24)] | None = Field(
        None,
        description="Number of frames to score where a module has more: a random stretch of this many frames, the same "
        "for the whole batch. None: all frames.",
    )
    common_positions: bool = Field(
        False,
        description="Predict all steps ahead from the same frames, those that the farthest step can be predicted from; "
        "otherwise each step uses all frames that it can.",
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="Reduction of the losses of the steps ahead.")
    score: Literal["dot", "mean"] = Field(
        "dot", description="Score of a prediction and an encoding: their dot product, or that divided by the channels."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the predictions.")

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
