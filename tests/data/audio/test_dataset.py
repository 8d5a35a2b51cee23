"""Sets of recordings: consistent parts, views of one array, and labels on LibriSpeech's grid."""

import numpy as np
import pytest

from cpc_ext.data import SpeechDataset, WaveformSet, label_count, load_dataset
from cpc_ext.data_sets import DATASETS, drawn_of, folder_of, idle_of_dataset, medium, origin

LENGTHS = (720, 399, 400)
PARTS = {
    "samples": np.arange(1519, dtype=np.int16),
    "starts": np.array([0, 720, 1119, 1519]),
    "names": ["1-1-0000", "1-1-0001", "7-1-0000"],
    "speakers": np.array([0, 0, 1]),
    "phones": np.array([3, 4, 5, 6], np.uint8),
    "phone_starts": np.array([0, 3, 3, 4]),
}


def test_labels_are_as_many_as_the_forced_alignments_have():
    """Two utterances of LibriSpeech and their numbers of labels; and the shortest that has one."""
    assert [label_count(samples) for samples in (179_360, 81_520, 400, 399, 0)] == [1119, 508, 1, 0, 0]


def test_recordings_and_labels_are_views_of_the_whole():
    waveforms = WaveformSet(**PARTS)
    assert len(waveforms) == 3
    for index, (start, end) in enumerate(((0, 720), (720, 1119), (1119, 1519))):
        np.testing.assert_array_equal(waveforms.recording(index), np.arange(start, end))
        assert np.shares_memory(waveforms.recording(index), waveforms.samples)
    assert [waveforms.phones_of(index).tolist() for index in range(3)] == [[3, 4, 5], [], [6]]
    assert waveforms.speakers_at(np.array([[0, 1118], [1119, 1518]])).tolist() == [[0, 0], [1, 1]]
    assert repr(waveforms) == "WaveformSet(3 recordings, 0.0 minutes, speakers and phones labels)"
    for index in (-1, 3):
        with pytest.raises(IndexError, match=r"expected 0\.\.2"):
            waveforms.recording(index)


def test_what_is_not_known_says_so():
    waveforms = WaveformSet(PARTS["samples"], PARTS["starts"], PARTS["names"])
    assert waveforms.speakers_at(np.array([0])) is None
    assert "no labels" in repr(waveforms)
    with pytest.raises(ValueError, match="no phone labels"):
        waveforms.phones_of(0)
    with pytest.raises(ValueError, match="no speakers"):
        _ = waveforms.known_speakers


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"samples": np.zeros(1519, np.float32)}, r"samples: expected int16 \[N\], got float32 \[1519\]"),
        ({"samples": np.zeros((1, 1519), np.int16)}, "samples: .*1, 1519"),
        ({"starts": np.array([0, 720, 1519])}, r"starts: expected int64 \[4\]"),
        ({"starts": np.array([0, 720, 1119, 1518])}, "starts: expected to ascend from 0 to 1519"),
        ({"starts": np.array([1, 720, 1119, 1519])}, "starts: expected to ascend"),
        ({"starts": np.array([0, 1119, 720, 1519])}, "starts: expected to ascend"),
        ({"starts": np.array([0, 720, 1119, 1519], np.int32)}, "starts: expected int64"),
        ({"speakers": np.array([0, 0])}, r"speakers: expected int64 \[3\]"),
        ({"speakers": np.array([0, 1, 0])}, "speakers: expected ascending"),
        ({"speakers": np.array([-1, 0, 0])}, "speakers: expected ascending"),
        ({"phones": None}, "together"),
        ({"phone_starts": None}, "together"),
        ({"phones": np.arange(4)}, "phones: expected uint8 or int16"),
        ({"phones": np.array([0, -1, 0, 0], np.int16)}, "phones: expected indices from 0, got -1"),
        ({"phone_starts": np.array([0, 3, 3, 5])}, "phone_starts: expected to ascend from 0 to 4"),
        ({"phone_starts": np.array([0, 4, 4, 4])}, "at most 3 of the 720 samples of 1-1-0000, got 4"),
        ({"phone_starts": np.array([0, 2, 3, 4])}, "at most 0 of the 399 samples of 1-1-0001, got 1"),
    ],
)
def test_parts_that_do_not_fit_are_errors(changed, named):
    with pytest.raises(ValueError, match=named):
        WaveformSet(**PARTS | changed)


def test_indices_need_names():
    whole = WaveformSet(**PARTS)
    names = {"speakers": ("1", "7"), "phone_names": tuple("abcdefg")}
    assert SpeechDataset("speech", whole, whole, **names).sample_rate == 16_000
    for short, part in (
        ({"speakers": ("1",)}, "speakers below 1, got 1"),
        ({"phone_names": ()}, "phones below 0, got 6"),
    ):
        with pytest.raises(ValueError, match=f"train: expected {part}"):
            SpeechDataset("speech", whole, None, **names | short)
    without = WaveformSet(PARTS["samples"], PARTS["starts"], PARTS["names"])
    with pytest.raises(ValueError, match="test: expected speakers"):
        SpeechDataset("speech", without, whole)
    with pytest.raises(ValueError, match="unlabeled: expected speakers"):
        SpeechDataset("speech", without, without, unlabeled=whole)


def test_models_learn_from_what_has_no_labels_where_there_is_such():
    few, many = (WaveformSet(np.zeros(n, np.int16), np.array([0, n]), ["1"]) for n in (400, 4000))
    assert SpeechDataset("speech", few, None).pretrain is few
    assert SpeechDataset("speech", few, None, unlabeled=many).pretrain is many


def test_data_sets_are_of_a_medium():
    """Those of images come first, as they did when there were no others."""
    media = [medium(name) for name in DATASETS]
    assert media == sorted(media, reverse=True)
    assert {name for name in DATASETS if medium(name) == "audio"} == {"voices", "librispeech", "audio-folder"}
    assert [drawn_of(of) for of in ("images", "audio")] == ["textures", "voices"]
    assert [folder_of(of) for of in ("images", "audio")] == ["folder", "audio-folder"]
    assert [origin(name).sized for name in ("voices", "librispeech", "audio-folder")] == [False] * 3
    assert idle_of_dataset("voices")["image_size"] == "--dataset voices is of sound"
    assert set(idle_of_dataset("voices")) == {"data_dir", "download", "image_size"}
    assert set(idle_of_dataset("audio-folder")) == {"download", "image_size", "utterances"}
    assert set(idle_of_dataset("librispeech")) == {"image_size", "utterances"}


def test_sound_has_no_pixels(tmp_path):
    for name in ("voices", "librispeech", "audio-folder"):
        with pytest.raises(ValueError, match=f"image_size: {name} is of sound, got 64"):
            load_dataset(name, tmp_path, image_size=64)
    with pytest.raises(ValueError, match="--data-dir with the folder of recordings"):
        load_dataset("audio-folder")
