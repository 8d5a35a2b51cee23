"""Synthetic speech: sixteen voices that say words of an invented language, generated from a seed in seconds.

A voice has its own length of vocal tract, pitch, rate and breathiness. A phone is a set of target formants of that
tract, with the sources that sound on the way there. Formants move as slowly as tongues do, so that a phone depends on
its neighbours and seldom reaches its targets; voiceless stops are silent until they burst. Every utterance is recorded
in another room, at another loudness, through another microphone and with background noise. So a single frame holds only
part of what is said, its energy little, and the surrounding frames the rest. Recordings differ less from each other
than frames within a recording do: otherwise a contrastive model would learn to distinguish rooms first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cpc_ext.data.audio.dataset import LABEL_CENTRE, LABEL_STEP, SAMPLE_RATE, SpeechDataset, WaveformSet, label_count
from cpc_ext.data.audio.synthesis import HOP, Course, synthesize

SPEAKERS = 16
# Utterances of each speaker, 3 to 4 seconds long.
SPLIT_SIZES = {"train": 11, "test": 4}
WORDS = 80
_FRAMES_A_SECOND = SAMPLE_RATE // HOP
# Formants take 105 ms to move to their next targets, longer than most phones last; amplitudes take 20 ms.
_TONGUE_FRAMES, _SOURCE_FRAMES = 21, 4


class Phone(NamedTuple):
    """A phone as produced by a vocal tract of 17 cm.

    f1, f2, f3: its target formants in Hz; 0 for those of a neighbour. ms: its duration.
    voicing, aspiration, frication: amplitudes of the sources. centre, width: of the frication's spectrum, in Hz.
    damping: factor on the bandwidths of all formants but the first. closed: ms of closure before the burst of a stop.
    """

    f1: float
    f2: float
    f3: float
    ms: float
    voicing: float = 1.0
    aspiration: float = 0.02
    frication: float = 0.0
    centre: float = 4000.0
    width: float = 2000.0
    damping: float = 1.0
    closed: float = 0.0


def _noisy(f2: float, centre: float, width: float, ms: float, frication: float, voicing: float = 0.0) -> Phone:
    return Phone(320, f2, 2600, ms, voicing, 0.0, frication, centre, width, 1.5)


def _stop(f2: float, f3: float, centre: float, width: float, *, voiced: bool) -> Phone:
    # A voiced stop hums during its closure; a voiceless one is aspirated after it.
    return Phone(
        *(250, f2, f3, 20 if voiced else 45),
        voicing=0.25 if voiced else 0.0,
        aspiration=0.03 if voiced else 0.35,
        frication=0.5,
        centre=centre,
        width=width,
        closed=45 if voiced else 60,
    )


SILENCE = "SIL"
# Formants of vowels: Peterson and Barney 1952; of the others: Klatt 1980, roughly.
VOWELS = {
    "IY": Phone(270, 2290, 3010, 95),
    "EH": Phone(530, 1840, 2480, 90),
    "AE": Phone(660, 1720, 2410, 115),
    "AA": Phone(730, 1090, 2440, 115),
    "AO": Phone(570, 840, 2410, 115),
    "UW": Phone(300, 870, 2240, 95),
    "AH": Phone(640, 1190, 2390, 75),
    "ER": Phone(490, 1350, 1690, 100),
}
GLIDES = {
    "W": Phone(290, 650, 2150, 60, 0.7),
    "Y": Phone(260, 2250, 3000, 60, 0.7),
    "L": Phone(360, 1050, 2800, 60, 0.7),
    "R": Phone(330, 1150, 1500, 60, 0.7),
}
NASALS = {
    "M": Phone(250, 1000, 2200, 65, 0.5, damping=3),
    "N": Phone(250, 1600, 2600, 65, 0.5, damping=3),
}
FRICATIVES = {
    "F": _noisy(1000, 4500, 5000, 90, 0.10),
    "S": _noisy(1700, 5600, 1300, 95, 0.16),
    "SH": _noisy(2000, 3000, 1000, 95, 0.16),
    "V": _noisy(1000, 4500, 5000, 60, 0.05, 0.4),
    "Z": _noisy(1700, 5600, 1300, 75, 0.10, 0.4),
    "HH": Phone(0, 0, 0, 60, 0.0, 0.30),
}
STOPS = {
    "P": _stop(900, 2300, 1200, 2500, voiced=False),
    "T": _stop(1800, 2700, 4500, 1500, voiced=False),
    "K": _stop(2100, 2400, 2200, 700, voiced=False),
    "B": _stop(900, 2300, 1200, 2500, voiced=True),
    "D": _stop(1800, 2700, 4500, 1500, voiced=True),
    "G": _stop(2100, 2400, 2200, 700, voiced=True),
}
CONSONANTS = {**GLIDES, **NASALS, **FRICATIVES, **STOPS}
PHONES = {**VOWELS, **CONSONANTS}
PHONE_NAMES = (SILENCE, *PHONES)


@dataclass(frozen=True)
class Voice:
    """A speaker.

    shorter: factor on the formants, above 1 for a vocal tract shorter than 17 cm. pitch: mean pitch in Hz.
    melody: range of the pitch in semitones. rate: speed of speech, 1 for the durations in the table of phones.
    breath: how much noise accompanies voicing. tilt: Hz above which the pulses' spectrum falls by 6 dB an octave.
    upper: fourth and fifth formants in Hz, before the factor.
    """

    shorter: float
    pitch: float
    melody: float
    rate: float
    breath: float
    tilt: float
    upper: tuple[float, float]


def _voice(rng: np.random.Generator, number: int) -> Voice:
    # Sizes are spread evenly, as independent draws would make some voices alike.
    size = (number + rng.random()) / SPEAKERS
    return Voice(
        shorter=0.88 + 0.34 * size,
        pitch=float(90 * 2 ** (1.3 * size + rng.normal(0, 0.2))),
        melody=rng.uniform(1, 3.5),
        rate=rng.uniform(0.85, 1.25),
        breath=rng.uniform(0.5, 3),
        tilt=rng.uniform(150, 600),
        upper=(rng.uniform(3300, 3900), rng.uniform(4400, 5200)),
    )


# Consonants that may end a word: all but the glides, which only precede vowels, and G. To add G now would change the
# words of every seed.
_ENDINGS = [*NASALS, *FRICATIVES, *STOPS][:-1]


def _word(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw a word of one to three syllables, each one or two consonants and a vowel, and at times a final consonant."""
    word: list[str] = []
    for _ in range(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25])):
        word.append(str(rng.choice(list(CONSONANTS))))
        if word[-1] in STOPS and rng.random() < 0.25:
            word.append(str(rng.choice(["L", "R", "W"])))
        word.append(str(rng.choice(list(VOWELS))))
    if rng.random() < 0.5:
        word.append(str(rng.choice(_ENDINGS)))
    return tuple(word)


class _Piece(NamedTuple):
    """A part of a phone with one set of targets: its label, its sound, and its duration in frames of 5 ms."""

    label: int
    sound: Phone
    frames: int


_PAUSE = Phone(0, 0, 0, 100, voicing=0.0, aspiration=0.0)


def _pieces(words: list[tuple[str, ...]], voice: Voice, rng: np.random.Generator) -> list[_Piece]:
    """Split a sentence into pieces, with silence around it and sometimes between words."""

    def frames(ms: float) -> int:
        return max(2, round(ms / voice.rate * rng.lognormal(0, 0.2) * _FRAMES_A_SECOND / 1000))

    pieces = [_Piece(0, _PAUSE, frames(150))]
    for number, word in enumerate(words):
        if number and rng.random() < 0.25:
            pieces.append(_Piece(0, _PAUSE, frames(140)))
        for name in word:
            label, sound = PHONE_NAMES.index(name), PHONES[name]
            if sound.closed:
                shut = sound._replace(aspiration=0.0, frication=0.0, voicing=0.15 * (sound.voicing > 0), damping=2.0)
                pieces.append(_Piece(label, shut, frames(sound.closed)))
            pieces.append(_Piece(label, sound, frames(sound.ms)))
    pieces.append(_Piece(0, _PAUSE, frames(150)))
    return pieces


def _smooth(values: np.ndarray, frames: int) -> np.ndarray:
    """Smooth values [T, ...] along time with a Hann window of this many frames, which bounds how fast they change."""
    kernel = np.hanning(frames + 2)[1:-1]
    padded = np.pad(values, ((frames // 2, frames - 1 - frames // 2), *[(0, 0)] * (values.ndim - 1)), "edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, frames, axis=0)
    smooth: np.ndarray = around @ (kernel / kernel.sum())
    return smooth


def _course(pieces: list[_Piece], voice: Voice, rng: np.random.Generator) -> Course:
    """Return the course of an utterance's parameters in a voice."""
    table = np.array([piece.sound for piece in pieces])
    # Formants vary from one utterance of a phone to the next. A piece without formants takes those of the piece after
    # it, or before it.
    targets = table[:, :3] * rng.lognormal(0, 0.07, (len(pieces), 3))
    for number in [*range(len(pieces) - 2, -1, -1), *range(1, len(pieces))]:
        if not targets[number, 0]:
            neighbour = number + 1 if number + 1 < len(pieces) and targets[number + 1, 0] else number - 1
            targets[number] = targets[neighbour]
    frames = [piece.frames for piece in pieces]
    values = np.repeat(np.c_[table[:, 3:], np.log(targets)], frames, axis=0)
    values = np.concatenate([values, values[-1:]])
    voicing, aspiration, frication, centre, width, damping = _smooth(values[:, 1:7], _SOURCE_FRAMES).T
    low = np.exp(_smooth(values[:, -3:], _TONGUE_FRAMES))
    formants = voice.shorter * np.c_[low, np.broadcast_to(voice.upper, (len(low), 2))]
    bandwidths = (50 + 0.04 * formants) * np.c_[np.ones(len(low)), np.repeat(damping[:, None], 4, 1)]
    count = len(values)
    drift = _smooth(rng.normal(0, 1, (count, 2)), 60) * 60**0.5
    fall = np.linspace(0.5, -0.5, count)
    pitch = voice.pitch * 2 ** (voice.melody * (drift[:, 0] * 0.5 + fall) / 12)
    loudness = 10 ** (0.15 * drift[:, 1])
    return Course(
        pitch=pitch,
        voicing=voicing * loudness,
        aspiration=(aspiration + 0.01 * voice.breath * voicing) * loudness,
        frication=frication * loudness,
        formants=np.minimum(formants, 7500),
        bandwidths=bandwidths,
        noise_centre=np.minimum(centre * voice.shorter**0.5, 7500),
        noise_width=width,
        tilt=voice.tilt,
    )


def _response(count: int, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a microphone's response at ``count`` frequencies, float32: a smooth curve of four cosines in decibels."""
    coarse = np.linspace(0, 1, 257)
    waves = np.cos(np.pi * coarse[:, None] * np.arange(1, 5)) @ rng.normal(0, decibels, 4)
    response: np.ndarray = np.interp(np.linspace(0, 1, count), coarse, 10 ** (waves / 20)).astype(np.float32)
    return response


def _recorded(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a sound, float32 [N], as int16, with reverberation, a microphone's response, noise and a level."""
    tail = round(rng.uniform(0.08, 0.2) * SAMPLE_RATE)
    room = rng.standard_normal(tail, np.float32) * np.exp(-6.9 * np.arange(tail, dtype=np.float32) / tail)
    room *= rng.uniform(0.05, 0.2) / np.linalg.norm(room)
    room[0] = 1
    size = 1 << (len(sound) + tail).bit_length()
    through = np.fft.rfft(sound, size) * np.fft.rfft(room, size) * _response(size // 2 + 1, 1.0, rng)
    heard = np.fft.irfft(through, size)[: len(sound)]
    noise = rng.standard_normal(len(sound), np.float32) * heard.std() * 10 ** (-rng.uniform(20, 25) / 20)
    mixed = heard + noise
    mixed *= 32768 * 10 ** (rng.uniform(-28, -24) / 20) / mixed.std()
    clipped: np.ndarray = np.clip(np.rint(mixed), -32768, 32767).astype(np.int16)
    return clipped


def _utterance(words: list[tuple[str, ...]], voice: Voice, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Synthesize a sentence in a voice: int16 [N], and its labels, uint8 [L]."""
    pieces = _pieces(words, voice, rng)
    sound = _recorded(synthesize(_course(pieces, voice, rng), rng), rng)
    by_frame = np.repeat([piece.label for piece in pieces], [piece.frames for piece in pieces])
    centres = LABEL_CENTRE + LABEL_STEP * np.arange(label_count(len(sound)))
    return sound, by_frame[centres // HOP].astype(np.uint8)


def make_voices(utterances: int, *, split: str = "train", seed: int = 0) -> WaveformSet:
    """Generate this many utterances of each of the sixteen speakers.

    The same seed gives the same voices and language, and the same first utterances whatever their number. The splits
    "train" and "test" share voices and words but no utterance. Raises ValueError for a negative number or seed, or an
    unknown split.
    """
    if utterances < 0:
        raise ValueError(f"utterances: expected 0 or more, got {utterances}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if split not in SPLIT_SIZES:
        raise ValueError(f"split: expected one of {', '.join(SPLIT_SIZES)}, got {split!r}")
    language = np.random.default_rng((seed, 0))
    lexicon = [_word(language) for _ in range(WORDS)]
    voices = [_voice(np.random.default_rng((seed, 1, number)), number) for number in range(SPEAKERS)]
    sounds, labels, names = [np.empty(0, np.int16)], [np.empty(0, np.uint8)], []
    for number, voice in enumerate(voices):
        for utterance in range(utterances):
            rng = np.random.default_rng((seed, 2, list(SPLIT_SIZES).index(split), number, utterance))
            words = [lexicon[word] for word in rng.integers(0, WORDS, rng.integers(6, 10))]
            sound, phones = _utterance(words, voice, rng)
            sounds.append(sound)
            labels.append(phones)
            names.append(f"{number + 1}-{list(SPLIT_SIZES).index(split) + 1}-{utterance:04}")
    return WaveformSet(
        samples=np.concatenate(sounds),
        starts=np.cumsum([len(sound) for sound in sounds]),
        names=names,
        speakers=np.repeat(np.arange(SPEAKERS), utterances),
        phones=np.concatenate(labels),
        phone_starts=np.cumsum([len(phones) for phones in labels]),
    )


def load(*, seed: int = 0, utterances: int | None = None) -> SpeechDataset:
    """Generate the data set of voices: about ten minutes for training, and nearly four of the same speakers to test on.

    utterances: number for each speaker that models learn from; ten of each last about ten minutes in total. Probes
        learn from the first eleven of each speaker in any case. Default: models learn from these, too.
    """
    splits = {split: make_voices(count, split=split, seed=seed) for split, count in SPLIT_SIZES.items()}
    return SpeechDataset(
        name="voices",
        train=splits["train"],
        test=splits["test"],
        speakers=tuple(f"voice-{number + 1:02}" for number in range(SPEAKERS)),
        phone_names=PHONE_NAMES,
        unlabeled=None if utterances is None else make_voices(utterances, seed=seed),
    )
