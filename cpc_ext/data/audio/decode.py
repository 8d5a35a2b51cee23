"""Decoding of recordings to int16 samples at 16 kHz, once and in threads, with libsndfile, and soxr for resampling.

A recording is decoded piece by piece, so that one of hours takes no more memory than its int16 samples. A file that
cannot be decoded is left out, with the reason.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from cpc_ext.data.audio.dataset import LABEL_WINDOW, SAMPLE_RATE
from cpc_ext.data.decoded_cache import require_lasting
from cpc_ext.data.file_tree import FileKind, FileTree, read_tree
from cpc_ext.data.libraries import optional
from cpc_ext.data.threads import in_order

if TYPE_CHECKING:
    from types import ModuleType

# Recordings decoded ahead of writing: half an hour of speech, a hundred megabytes.
AHEAD = 128
_PIECE = 1 << 19
# Share of a floating-point file's samples that may lie beyond ±1 and are clipped; with more, the scale is another one.
_BEYOND = 0.01
# libsndfile's log entry for a WAV, AIFF, AU, SVX or W64 header that states more sound than the file has. Programs that
# write into a pipe state the largest sizes (_OPEN_END and more), and others count the header, a share below _FORGIVEN.
_CUT_OFF = re.compile(r"(?:data|SSND|Data Size|BODY|riff) *: (\d+) \(should be (\d+)\)")
# The same for RF64 and AVR, in samples of a channel. The log lacks the length that a NIST SPHERE header states, and for
# VOC it has no numbers. The headers of IRCAM, PAF and PVF state no length.
_SAMPLES = {
    "RF64": re.compile(r"does not match value from 'ds64' chunk of (\d+)"),
    "AVR": re.compile(r"^ +Frames +: (\d+)$", re.MULTILINE),
}
_TRUNCATED = "Seems to be a truncated file"
_NIST_HEADER, _NIST_SAMPLES = 1024, re.compile(rb"^sample_count -i +(\d+)", re.MULTILINE)
_OPEN_END, _FORGIVEN = 2**31 - 2**16, 0.01
# Lowest plausible sampling rate in Hz: a header that says 1 Hz would turn a second of sound into hours.
_LOWEST_RATE = 1000
# Samples in two MP3 frames: encoders and editors may state a length that is off by as much.
_MP3_FRAMES = 2 * 1152
# Formats that libsndfile reads, but that have no header with a sampling rate, or are not recordings.
_NO_RECORDINGS = {"RAW", "MAT4", "MAT5", "XI", "SDS", "MPC2K", "WVE"}
# File name extensions of formats that are not named after their extension.
_SUFFIXES = {
    "AIFF": {"aif", "aiff", "aifc"},
    "AU": {"au", "snd"},
    "MP3": {"mp3", "mp2"},
    "NIST": {"nist", "sph"},
    "OGG": {"ogg", "oga", "opus"},
}
_OTHERS = frozenset((".aac", ".ac3", ".amr", ".ape", ".dsf", ".m4a", ".mka", ".mp3", ".opus", ".sph", ".wma", ".wv"))


class Recording(NamedTuple):
    """A decoded file: int16 [N] at 16 kHz, and whether samples beyond ±1 were clipped."""

    samples: np.ndarray
    cut_off: bool


@dataclass
class DecodedFiles:
    """Results of decoding files.

    lengths: number of samples of each file, 0 if it could not be decoded. reasons: why it could not, by file index.
    cut_off: indices of floating-point files with samples beyond ±1, which were clipped.
    """

    lengths: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    cut_off: list[int] = field(default_factory=list)


def library(name: str) -> ModuleType:
    """Import one of the libraries that recordings need. Raises ImportError that says how to install a missing one."""
    found: ModuleType = optional(name, "audio", "recordings")
    return found


def reader() -> tuple[str, str]:
    """Return the name of the library that reads files, and its version."""
    return "libsndfile", str(library("soundfile").__libsndfile_version__)


def read_recordings(root: Path, *, splits: bool = True) -> FileTree:
    """Find the recordings below root with :func:`read_tree`."""
    formats = set(library("soundfile").available_formats()) - _NO_RECORDINGS
    library("soxr")
    endings = {ending for name in formats for ending in _SUFFIXES.get(name, {name.lower()})}
    kind = FileKind(
        what=("recording", "recordings"),
        examples=".wav, .flac, .ogg, .mp3",
        suffixes=frozenset(f".{ending}" for ending in endings),
        others=_OTHERS,
        media_type="audio",
        reader=" ".join(reader()),
    )
    return read_tree(root, kind, splits=splits)


def decode_files(files: Sequence[Path], out: BinaryIO) -> DecodedFiles:
    """Append every recording that can be decoded to ``out`` as int16 samples at 16 kHz."""
    done = DecodedFiles()
    with closing(
        in_order(partial(decode_or_reason, kept=True), files, ahead=AHEAD, what=("recording", "recordings"))
    ) as decoded:
        for index, found in enumerate(decoded):
            if isinstance(found, str):
                done.reasons[index] = found
                done.lengths.append(0)
                continue
            done.lengths.append(len(found.samples))
            if found.cut_off:
                done.cut_off.append(index)
            out.write(found.samples.data)
    return done


def decode_recording(path: Path) -> Recording:
    """Decode one recording to 16 kHz, as the mean of its channels.

    The samples of a 16-bit file with one channel at 16 kHz stay as they are. Other integers are scaled by the range of
    their type, floating point from ±1, and values beyond are clipped. Raises ValueError if floating-point values have
    another scale or the file holds less than its header says, and whatever libsndfile raises.
    """
    with library("soundfile").SoundFile(path) as file:
        if file.samplerate < _LOWEST_RATE:
            raise ValueError(f"{file.samplerate} samples a second, which are too few for sound")
        resampled = None
        if file.samplerate != SAMPLE_RATE:
            resampled = library("soxr").ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
        pieces: list[np.ndarray] = []
        read = beyond = 0
        while True:
            piece = file.read(_PIECE, dtype="float32", always_2d=True)
            read += len(piece)
            if file.subtype in ("FLOAT", "DOUBLE"):
                beyond += _beyond(piece)
            mono = piece.mean(axis=1)
            if resampled is not None:
                mono = resampled.resample_chunk(mono, last=len(piece) < _PIECE)
            pieces.append(np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16))
            if len(piece) < _PIECE:
                break
        _check(path, file, read, beyond)
    samples = np.concatenate(pieces)
    if len(samples) < LABEL_WINDOW:
        raise ValueError(f"{len(samples)} samples at 16 kHz, shorter than {LABEL_WINDOW}")
    return Recording(samples, beyond > 0)


def _beyond(piece: np.ndarray) -> int:
    """Count the values beyond ±1. Raises ValueError if any is infinite or NaN."""
    if not np.isfinite(piece).all():
        raise ValueError("has samples that are infinite or no numbers")
    return int((np.abs(piece) > 1).sum())


def _check(path: Path, file: Any, read: int, beyond: int) -> None:
    """Raise ValueError if a file holds fewer samples than it states, or samples of another scale than ±1."""
    if not read:
        raise ValueError("holds no samples")
    stated, there = map(int, found.groups()) if (found := _CUT_OFF.search(file.extra_info)) else (0, 0)
    if stated < _OPEN_END and stated - there > _FORGIVEN * stated:
        raise ValueError(f"damaged: {there} of {stated} bytes of sound are there")
    if _TRUNCATED in file.extra_info:
        raise ValueError("damaged: its header speaks of more sound than is there")
    stated = _stated_samples(path, file)
    if stated < _OPEN_END and stated - read > _FORGIVEN * stated:
        raise ValueError(f"damaged: {read} of {stated} samples can be read")
    forgiven = 0.0
    if file.format == "MP3":
        forgiven = max(_FORGIVEN * file.frames, _MP3_FRAMES) if _states_length(path) else file.frames
    if file.frames - read > forgiven:
        raise ValueError(f"damaged: {read} of {file.frames} samples can be read")
    if beyond > _BEYOND * read * file.channels:
        raise ValueError(f"floating point with {beyond} samples beyond -1 to 1, which is the scale of sound")


def _stated_samples(path: Path, file: Any) -> int:
    """Return the number of samples in the header of formats for which libsndfile counts those in the file; else 0."""
    found: re.Match[Any] | None = None
    if file.format in _SAMPLES:
        found = _SAMPLES[file.format].search(file.extra_info)
    elif file.format == "NIST":
        with path.open("rb") as head:
            found = _NIST_SAMPLES.search(head.read(_NIST_HEADER))
    return int(found[1]) if found else 0


def _states_length(path: Path) -> bool:
    """Return whether an MP3's first frame states the number of frames; without, libsndfile estimates its length."""
    with path.open("rb") as file:
        tag = file.read(10)
        length = 0
        if tag.startswith(b"ID3"):
            for byte in tag[6:]:
                length = length << 7 | byte
            length += 10
        file.seek(length)
        # After the frame header and the side information, whose length depends on version, channels and checksum.
        found = re.search(rb"(?:Xing|Info)...(.)", file.read(64), re.DOTALL)
    return found is not None and bool(found[1][0] & 1)


def decode_or_reason(path: Path, *, kept: bool = False) -> Recording | str:
    """Decode a recording, or return the reason why it cannot be decoded.

    kept: whether the result is kept for longer than an error may last. An error that may pass, such as one of the
        network, then raises ValueError (see :func:`require_lasting`).
    """
    # A damaged file makes libsndfile raise errors of its own, which are RuntimeErrors.
    try:
        return decode_recording(path)
    except Exception as error:
        if kept:
            require_lasting(path, _of_system(path, error))
        return _reason(path, error)


def _of_system(path: Path, error: Exception) -> Exception:
    """Return the operating system's error if libsndfile reports only that there was one, else the error itself."""
    if "system error" not in getattr(error, "error_string", "").lower():
        return error
    try:
        path.open("rb").close()
    except OSError as said:
        return said
    return OSError(errno.EAGAIN, "could not be opened, and can now")


def _reason(path: Path, error: Exception) -> str:
    """Return the reason why a file could not be decoded, without its name."""
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = getattr(error, "error_string", None) or str(error) or type(error).__name__
    if "does not exist" in said and path.is_file():  # libsndfile's error for a file named .mp3 that is no MP3.
        said = "holds no sound that libsndfile recognises"
    return " ".join(said.split())[:200]
