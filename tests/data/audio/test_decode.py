"""Decoding to int16 at 16 kHz: unchanged bits for such files, scaling by the type's range for others, or a reason."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest

from cpc_ext.data import libraries
from cpc_ext.data.audio import decode
from cpc_ext.data.audio.decode import decode_files, decode_recording, library

soundfile = pytest.importorskip("soundfile", reason="needs cpc_ext[audio]")

RATE = 16_000
NOISE = np.random.default_rng(0).integers(-32768, 32768, RATE).astype(np.int16)
TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.caf", "a.nist", "a.rf64", "a.w64", "a.svx"])
def test_16_bits_at_16_khz_are_kept_bit_for_bit(tmp_path, name):
    soundfile.write(tmp_path / name, NOISE, RATE, subtype="PCM_16")
    recording = decode_recording(tmp_path / name)
    assert recording.samples.dtype == np.int16
    np.testing.assert_array_equal(recording.samples, NOISE)
    assert not recording.cut_off


@pytest.mark.parametrize(
    ("subtype", "step"), [("PCM_U8", 1 / 128), ("PCM_24", 1 / 32768), ("PCM_32", 1 / 32768), ("FLOAT", 1 / 32768)]
)
def test_other_numbers_are_scaled_by_their_range(tmp_path, subtype, step):
    soundfile.write(tmp_path / "a.wav", TONE, RATE, subtype=subtype)
    recording = decode_recording(tmp_path / "a.wav")
    np.testing.assert_allclose(recording.samples / 32768, TONE, atol=step)
    assert not recording.cut_off


@pytest.mark.parametrize("name", ["a.mp3", "a.ogg"])
def test_lossy_formats(tmp_path, name):
    soundfile.write(tmp_path / name, TONE, RATE)
    samples = decode_recording(tmp_path / name).samples
    assert abs(len(samples) - RATE) < 2400  # MP3 has frames of its own.
    assert samples.std() == pytest.approx(TONE.std() * 32768, rel=0.1)


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x01\x48" + bytes(200)])
def test_an_mp3_that_lacks_frames_which_it_states_is_damaged(tmp_path, rate, tag):
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.resize(NOISE, 4 * rate), rate)
    whole = path.read_bytes()
    assert b"Xing" in whole[:64]
    path.write_bytes(tag + whole)
    assert abs(len(decode_recording(path).samples) - 4 * RATE) < 2
    path.write_bytes((tag + whole)[:-100])  # The last frame of a stream is often broken.
    decode_recording(path)
    path.write_bytes(tag + whole[: len(whole) * 9 // 10])
    with pytest.raises(ValueError, match=f"damaged: [0-9]+ of {4 * rate} samples can be read"):
        decode_recording(path)
    # Without a stated number of frames, a file may end anywhere.
    path.write_bytes(tag + whole[: len(whole) * 9 // 10].replace(b"Xing", bytes(4)))
    decode_recording(path)


def test_channels_are_averaged(tmp_path):
    left, right = NOISE // 2, NOISE[::-1] // 4
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), RATE)
    expected = np.rint((left.astype(np.float32) + right) / 2)
    np.testing.assert_array_equal(decode_recording(tmp_path / "a.wav").samples, expected)


@pytest.mark.parametrize("rate", [44_100, 48_000, 8_000, 11_025])
def test_rates_become_16_khz(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(decode, "_PIECE", 5000)  # The sound is decoded in several pieces.
    time = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    samples = decode_recording(tmp_path / "a.wav").samples
    assert abs(len(samples) - 2 * RATE) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / RATE)
    middle = slice(1000, -1000)
    np.testing.assert_allclose(samples[middle] / 32768, expected[middle], atol=2e-3)


@pytest.mark.parametrize("piece", [100, 4000, RATE, RATE + 1])
def test_pieces_make_the_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(decode, "_PIECE", piece)
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)
    np.testing.assert_array_equal(decode_recording(tmp_path / "a.wav").samples, NOISE)


def test_what_lies_beyond_is_cut_off(tmp_path):
    loud = TONE.copy()
    loud[:100], loud[100:160] = 1.5, -3
    soundfile.write(tmp_path / "a.wav", loud, RATE, subtype="FLOAT")
    recording = decode_recording(tmp_path / "a.wav")
    assert recording.cut_off
    assert (recording.samples[:100] == 32767).all()
    assert (recording.samples[100:160] == -32768).all()
    np.testing.assert_allclose(recording.samples[160:] / 32768, TONE[160:], atol=1 / 32768)


def cut(path, name) -> None:
    """Write the first half of a sound file."""
    source = path.with_name(f"whole.{name}")
    soundfile.write(source, NOISE, RATE)
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


WRONG = {
    "empty.wav": (lambda path: path.touch(), "the file is empty"),
    "text.mp3": (lambda path: path.write_text("no sound" * 50), "that libsndfile recognises"),
    "text.wav": (lambda path: path.write_text("no sound" * 50), "Format not recognised"),
    "none.wav": (lambda path: soundfile.write(path, NOISE[:0], RATE), "holds no samples"),
    "slow.wav": (lambda path: soundfile.write(path, NOISE, 100), "100 samples a second, which are too few for sound"),
    "short.wav": (lambda path: soundfile.write(path, NOISE[:399], RATE), "399 samples at 16 kHz, shorter than 400"),
    **{
        f"cut.{name}": (lambda path, name=name: cut(path, name), "damaged: .* of 3200[08] bytes of sound are there")
        for name in ("wav", "aiff", "au", "svx")
    },
    "cut.w64": (lambda path: cut(path, "w64"), "damaged: .* of .* bytes of sound are there"),
    "cut.sph": (lambda path: cut(path, "nist"), "damaged: 7[0-9]* of 16000 samples can be read"),
    "cut.rf64": (lambda path: cut(path, "rf64"), "damaged: 79[0-9]* of 16000 samples can be read"),
    "cut.avr": (lambda path: cut(path, "avr"), "damaged: 79[0-9]* of 16000 samples can be read"),
    "cut.voc": (lambda path: cut(path, "voc"), "damaged: its header speaks of more sound than is there"),
    "cut.flac": (lambda path: cut(path, "flac"), "lost sync|damaged: .* of 16000 samples"),
    "cut.ogg": (lambda path: cut(path, "ogg"), "malformed|holds no samples|damaged: .* of 16000 samples"),
    "infinite.wav": (
        lambda path: soundfile.write(path, np.append(TONE, np.inf), RATE, subtype="FLOAT"),
        "infinite or no numbers",
    ),
    "integers.wav": (
        lambda path: soundfile.write(path, TONE * 32768, RATE, subtype="FLOAT"),
        "floating point with .* samples beyond -1 to 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_recording_has_a_reason(tmp_path, name):
    write, reason = WRONG[name]
    write(tmp_path / name)
    soundfile.write(tmp_path / "good.wav", NOISE, RATE)
    with (tmp_path / "out").open("wb") as out:
        done = decode_files([tmp_path / name, tmp_path / "good.wav"], out)
    assert list(done.reasons) == [0]
    assert re.search(reason, done.reasons[0])
    assert name not in done.reasons[0]
    assert done.lengths == [0, RATE]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.int16), NOISE)


def test_names_may_be_wrong(tmp_path):
    for name, other in (("a.wav", "a.flac"), ("a.flac", "a.mp3")):
        soundfile.write(tmp_path / name, NOISE, RATE)
        (tmp_path / name).rename(tmp_path / other)
        np.testing.assert_array_equal(decode_recording(tmp_path / other).samples, NOISE)


@pytest.mark.parametrize("stated", [2**32 - 1, 2**31 - 37, 32_000 + 44])
def test_a_header_of_a_stream_and_one_that_counts_itself_are_no_damage(tmp_path, stated):
    """What writes into a pipe does not know how much will come."""
    soundfile.write(tmp_path / "a.wav", NOISE, RATE, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = stated.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    np.testing.assert_array_equal(decode_recording(tmp_path / "a.wav").samples, NOISE)


def test_files_stay_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "AHEAD", 3)
    files = [tmp_path / f"{number}.wav" for number in range(8)]
    for number, path in enumerate(files):
        soundfile.write(path, NOISE[number * 1000 : (number + 1) * 1000], RATE)
    with (tmp_path / "out").open("wb") as out:
        assert decode_files(files, out).lengths == [1000] * 8
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.int16), NOISE[:8000])


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    for error in (ImportError("No module named 'soxr'"), OSError("sndfile library not found")):

        def missing(name, error=error):
            raise error

        monkeypatch.setattr(libraries, "import_module", missing)
        with pytest.raises(ImportError, match=r"soxr \(.*\): pip install 'cpc_ext\[audio\]'"):
            library("soxr")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, None])
def test_an_error_that_may_pass_is_not_kept(tmp_path, monkeypatch, number):
    """libsndfile tells of none of the system's errors which it was; None: it has passed when one looks."""
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE, RATE)

    class Failing:
        def __init__(self, path):
            raise soundfile.LibsndfileError(2, f"Error opening {path}: ")

    def opened(path, *mode):
        raise OSError(number, os.strerror(number))

    with (tmp_path / "out").open("wb") as out, monkeypatch.context() as patch:
        patch.setattr(soundfile, "SoundFile", Failing)
        if number is not None:
            patch.setattr(Path, "open", opened)
        expected = os.strerror(number) if number is not None else "could not be opened, and can now"
        with pytest.raises(ValueError, match=f"a.wav: {expected}; try again, or take the file away$"):
            decode_files([path], out)


def test_a_file_that_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)

    class Failing:
        def __init__(self, path):
            raise soundfile.LibsndfileError(2, f"Error opening {path}: ")

    def opened(path, *mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    with (tmp_path / "out").open("wb") as out:
        monkeypatch.setattr(soundfile, "SoundFile", Failing)
        monkeypatch.setattr(Path, "open", opened)
        assert list(decode_files([tmp_path / "a.wav"], out).reasons) == [0]
