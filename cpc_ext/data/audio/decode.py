"""Recordings in files to int16 samples at 16 kHz: decoded once, by threads, by libsndfile, and resampled by soxr.

A recording passes through in pieces, so that one of hours takes no more memory than its samples do in the end. What
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

# Decoded ahead of writing: half an hour of speech, a hundred megabytes.
AHEAD = 128
_PIECE = 1 << 19
# Share of the samples of a file in floating point that may lie beyond ±1, and are cut off; more are of another scale.
_BEYOND = 0.01
# How libsndfile tells that the header of WAV, AIFF, AU, SVX or W64 speaks of more sound than there is. Programs that
# write into a pipe put the largest sizes there, and others count the header as well: so small a share is forgiven.
_CUT_OFF = re.compile(r"(?:data|SSND|Data Size|BODY|riff) *: (\d+) \(should be (\d+)\)")
# Likewise of RF64 and AVR, in samples of a channel; what a NIST SPHERE file says of itself it does not tell. Of VOC it
# tells no numbers. The headers of IRCAM, PAF and PVF do not speak of a length.
_SAMPLES = {
    "RF64": re.compile(r"does not match value from 'ds64' chunk of (\d+)"),
    "AVR": re.compile(r"^ +Frames +: (\d+)$", re.MULTILINE),
}
_TRUNCATED = "Seems to be a truncated file"
_NIST_HEADER, _NIST_SAMPLES = 1024, re.compile(rb"^sample_count -i +(\d+)", re.MULTILINE)
_OPEN_END, _FORGIVEN = 2**31 - 2**16, 0.01
# Samples a second, of which no sound has fewer: a header that says 1 would make hours of what is a second.
_LOWEST_RATE = 1000
# Samples in two frames of MP3, by which encoders and editors may be off where they state its length.
_MP3_FRAMES = 2 * 1152
# What libsndfile reads that has no header to tell the rate by, and what is no recording.
_NO_RECORDINGS = {"RAW", "MAT4", "MAT5", "XI", "SDS", "MPC2K", "WVE"}
# Endings of formats that are called otherwise.
_SUFFIXES = {
    "AIFF": {"aif", "aiff", "aifc"},
    "AU": {"au", "snd"},
    "MP3": {"mp3", "mp2"},
    "NIST": {"nist", "sph"},
    "OGG": {"ogg", "oga", "opus"},
}
_OTHERS = frozenset((".aac", ".ac3", ".amr", ".ape", ".dsf", ".m4a", ".mka", ".mp3", ".opus", ".sph", ".wma", ".wv"))


class Recording(NamedTuple):
    """A decoded file: int16 [N] at 16 kHz, and whether samples beyond ±1 were cut off."""

    samples: np.ndarray
    cut_off: bool


@dataclass
class DecodedFiles:
    """What became of files.

    lengths: samples of each, 0 where it could not be decoded; reasons: why, by the file's index.
    cut_off: indices of files in floating point that had samples beyond ±1.
    """

    lengths: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    cut_off: list[int] = field(default_factory=list)


def library(name: str) -> ModuleType:
    """One of the libraries that recordings need. ImportError that says how to get it where it is missing."""
    found: ModuleType = optional(name, "audio", "recordings")
    return found


def reader() -> tuple[str, str]:
    """The library that reads files, and its version."""
    return "libsndfile", str(library("soundfile").__libsndfile_version__)


def read_recordings(root: Path, *, splits: bool = True) -> FileTree:
    """Find the recordings below root, as :func:`read_tree` finds files."""
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
    """One recording at 16 kHz, the mean of its channels.

    Integers of 16 bits are kept as they are where the rate and the channels are; others are scaled by the range of
    their type, and floating point from ±1, what lies beyond being cut off. ValueError where the values are of no such
    scale or the file does not hold what it says, and whatever else libsndfile raises.
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
    """How many of these values lie beyond ±1. ValueError where some are no numbers."""
    if not np.isfinite(piece).all():
        raise ValueError("has samples that are infinite or no numbers")
    return int((np.abs(piece) > 1).sum())


def _check(path: Path, file: Any, read: int, beyond: int) -> None:
    """ValueError where a file does not hold the samples that it says, or these are of another scale."""
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
    """Samples that a header speaks of where libsndfile counts those that are there; 0 elsewhere."""
    found: re.Match[Any] | None = None
    if file.format in _SAMPLES:
        found = _SAMPLES[file.format].search(file.extra_info)
    elif file.format == "NIST":
        with path.open("rb") as head:
            found = _NIST_SAMPLES.search(head.read(_NIST_HEADER))
    return int(found[1]) if found else 0


def _states_length(path: Path) -> bool:
    """Whether an MP3 says in its first frame how many there are; elsewhere its length is an estimate."""
    with path.open("rb") as file:
        tag = file.read(10)
        length = 0
        if tag.startswith(b"ID3"):
            for byte in tag[6:]:
                length = length << 7 | byte
            length += 10
        file.seek(length)
        # Behind the header and what is for the decoder, whose length depends on version, channels and checksum.
        found = re.search(rb"(?:Xing|Info)...(.)", file.read(64), re.DOTALL)
    return found is not None and bool(found[1][0] & 1)


def decode_or_reason(path: Path, *, kept: bool = False) -> Recording | str:
    """The recording, or why there is none; kept: for longer than the error may last, which then is a ValueError."""
    # A damaged file makes libsndfile raise errors of its own, which are RuntimeErrors.
    try:
        return decode_recording(path)
    except Exception as error:
        if kept:
            require_lasting(path, _of_system(path, error))
        return _reason(path, error)


def _of_system(path: Path, error: Exception) -> Exception:
    """What the system said where libsndfile says no more than that it was the system."""
    if "system error" not in getattr(error, "error_string", "").lower():
        return error
    try:
        path.open("rb").close()
    except OSError as said:
        return said
    return OSError(errno.EAGAIN, "could not be opened, and can now")


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be decoded, without its name."""
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = getattr(error, "error_string", None) or str(error) or type(error).__name__
    if "does not exist" in said and path.is_file():  # So libsndfile says of what is called MP3 and is none.
        said = "holds no sound that libsndfile recognises"
    return " ".join(said.split())[:200]
