"""The synthetic voices: reproducible, labelled at the right times, hard to classify by one frame, easier by several."""

import numpy as np
import pytest

from cpc_ext.data import label_count, load_dataset
from cpc_ext.data.audio.drawn import voices as drawn
from cpc_ext.data.audio.drawn.voices import PHONE_NAMES, PHONES, SPEAKERS, SPLIT_SIZES, make_voices


@pytest.fixture(scope="module")
def voices():
    """Fewer utterances than the data set has, so that generating them takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "SPLIT_SIZES", {"train": 5, "test": 2})
        return load_dataset("voices")


@pytest.fixture
def two_speakers(monkeypatch):
    monkeypatch.setattr(drawn, "SPEAKERS", 2)


def frames(samples: np.ndarray) -> np.ndarray:
    """The 25 ms around every label, [L, 400]."""
    windows = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float32) / 32768, 400)[::160]
    return windows * np.hanning(400).astype(np.float32)


def filters(count: int = 40) -> np.ndarray:
    """Return triangular filters on the mel scale from 0 to 8000 Hz, [257, count]."""
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), count + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    frequency = np.fft.rfftfreq(512, 1 / 16_000)[:, None]
    rise, fall = (frequency - low) / (middle - low), (high - frequency) / (high - middle)
    return np.minimum(rise, fall).clip(0).astype(np.float32)


FILTERS = filters()


def log_mel(samples: np.ndarray) -> np.ndarray:
    return np.log(np.abs(np.fft.rfft(frames(samples), 512)) ** 2 @ FILTERS + 1e-8)


def log_energy(samples: np.ndarray) -> np.ndarray:
    energy = np.log((frames(samples) ** 2).sum(1, keepdims=True) + 1e-8)
    return np.c_[energy, energy**2, energy**3]


def with_neighbours(features: np.ndarray, reach: int) -> np.ndarray:
    padded = np.pad(features, ((reach, reach), (0, 0)), "edge")
    return np.concatenate([padded[shift : shift + len(features)] for shift in range(2 * reach + 1)], axis=1)


def ridge_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, classes: int) -> float:
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (np.c_[(x - mean) / std, np.ones(len(x))] for x in (train, test))
    weights = np.linalg.solve(train.T @ train + np.eye(train.shape[1]), train.T @ np.eye(classes)[labels])
    return float(((test @ weights).argmax(1) == truth).mean())


def phone_accuracy(voices, features) -> float:
    parts = [(part, np.concatenate([features(part.recording(i)) for i in range(len(part))])) for part in both(voices)]
    (train, of_train), (test, of_test) = parts
    return ridge_accuracy(of_train, train.phones, of_test, test.phones, len(PHONE_NAMES))


def both(voices):
    return voices.train, voices.test


def majority(voices) -> float:
    return float(np.bincount(voices.test.phones).max() / len(voices.test.phones))


def test_energy_tells_little(voices):
    assert majority(voices) < 0.16
    assert phone_accuracy(voices, log_energy) < majority(voices) + 0.12


def test_a_frame_tells_part_and_its_neighbours_more(voices):
    alone = phone_accuracy(voices, log_mel)
    together = phone_accuracy(voices, lambda samples: with_neighbours(log_mel(samples), 3))
    assert 0.35 < alone < 0.55
    assert together > alone + 0.05


def test_the_mean_spectrum_tells_most_voices(voices):
    means = [np.stack([log_mel(part.recording(i)).mean(0) for i in range(len(part))]) for part in both(voices)]
    accuracy = ridge_accuracy(means[0], voices.train.speakers, means[1], voices.test.speakers, SPEAKERS)
    assert 0.5 < accuracy < 0.95


def test_labels_lie_where_the_phones_sound(voices):
    """Moved by some frames, they fit the sound less; and they are as many as LibriSpeech's grid has."""
    part = voices.train
    assert np.diff(part.phone_starts).tolist() == [label_count(length) for length in np.diff(part.starts)]
    features = np.concatenate([log_mel(part.recording(i)) for i in range(len(part))])

    def fit(shift: int) -> float:
        labels = np.concatenate([np.roll(part.phones_of(i), shift) for i in range(len(part))])
        return ridge_accuracy(features, labels, features, labels, len(PHONE_NAMES))

    there = fit(0)
    assert all(fit(shift) < there - 0.02 for shift in (-3, 3))


def test_silence_is_quiet_and_hisses_are_high(voices):
    part = voices.train
    power = np.concatenate([np.abs(np.fft.rfft(frames(part.recording(i)), 512)) ** 2 for i in range(len(part))])
    by_phone = {name: power[part.phones == number] for number, name in enumerate(PHONE_NAMES)}
    loudness = {name: np.median(found.sum(1)) for name, found in by_phone.items()}
    assert all(loudness["SIL"] < loudness[vowel] / 5 for vowel in ("IY", "AA", "UW"))
    bins = np.arange(257)
    centre = {name: np.median((found @ bins) / found.sum(1)) for name, found in by_phone.items()}
    assert centre["S"] > centre["SH"] > centre["AA"]
    assert centre["S"] > centre["Z"]


def test_every_phone_and_speaker_is_in_both_splits(voices):
    for part in both(voices):
        assert set(part.phones.tolist()) == set(range(len(PHONE_NAMES)))
        assert np.bincount(part.speakers).tolist() == [len(part) / SPEAKERS] * SPEAKERS
        assert part.samples.dtype == np.int16
        assert np.abs(part.samples.astype(int)).max() > 3000
        assert (np.abs(part.samples.astype(int)) >= 32767).mean() < 1e-3
    assert [len(part) for part in both(voices)] == [5 * SPEAKERS, 2 * SPEAKERS]
    assert voices.phone_names == ("SIL", *PHONES)
    assert len(voices.speakers) == SPEAKERS


def test_the_data_set_has_ten_minutes_and_three(voices):
    minutes = len(voices.train.samples) / 16_000 / 60 / 5
    assert 9 < SPLIT_SIZES["train"] * minutes < 12
    assert 3 < SPLIT_SIZES["test"] * minutes < 5


def test_models_learn_from_more_and_probes_from_the_same(two_speakers, monkeypatch):
    monkeypatch.setattr(drawn, "SPLIT_SIZES", {"train": 2, "test": 1})
    few, more = load_dataset("voices"), load_dataset("voices", utterances=3)
    assert few.pretrain is few.train
    assert [len(part) for part in (more.train, more.pretrain, more.test)] == [4, 6, 2]
    np.testing.assert_array_equal(few.train.samples, more.train.samples)
    for speaker in range(2):
        np.testing.assert_array_equal(more.pretrain.recording(3 * speaker + 1), few.train.recording(2 * speaker + 1))


def test_only_voices_have_utterances():
    for name in ("textures", "librispeech"):
        with pytest.raises(ValueError, match=f"utterances: {name} has no drawn voices, got 3"):
            load_dataset(name, utterances=3)


def test_same_seed_same_bytes_and_first_utterances(two_speakers):
    longer, shorter = make_voices(2, seed=3), make_voices(1, seed=3)
    for number in range(2):
        np.testing.assert_array_equal(longer.recording(2 * number), shorter.recording(number))
        np.testing.assert_array_equal(longer.phones_of(2 * number), shorter.phones_of(number))


def test_seeds_and_splits_share_no_utterance(two_speakers):
    sets = [make_voices(1, split=split, seed=seed) for split in SPLIT_SIZES for seed in (0, 1)]
    for of in ("recording", "phones_of"):
        assert len({getattr(one, of)(number).tobytes() for one in sets for number in range(2)}) == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"utterances": -1}, "utterances"),
        ({"utterances": 1, "seed": -1}, "seed"),
        ({"utterances": 1, "split": "val"}, "split"),
    ],
)
def test_bad_arguments_name_themselves(arguments, named):
    with pytest.raises(ValueError, match=named):
        make_voices(**arguments)


def test_no_utterances():
    assert len(make_voices(0)) == 0
