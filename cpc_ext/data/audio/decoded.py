"""The decoded recordings of a folder, cached in one memory-mapped file, and the sets made of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpc_ext._messages import some
from cpc_ext.data.audio.dataset import WaveformSet, label_count
from cpc_ext.data.audio.decode import decode_files, library, reader
from cpc_ext.data.decoded_cache import DecodedCache
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.notice import LeftOut

# Part of a cache's key: raise it when what decoding writes changes.
FORMAT = 4
# The largest difference between a recording's number of labels and its grid; with more, they are another recording's.
_LABELS_OFF = 2


@dataclass(frozen=True)
class DecodedRecordings:
    """The recordings of files, end to end in the order of the files.

    samples: int16 [N], memory-mapped. lengths: int64, the number of samples of each file, 0 if it was left out.
    """

    files: Sequence[TreeFile]
    samples: np.ndarray
    lengths: np.ndarray

    def part(
        self,
        rows: range,
        names: Sequence[str],
        speakers: Sequence[int] | None,
        phones: dict[str, np.ndarray] | None = None,
    ) -> WaveformSet:
        """Return the recordings of consecutive files as a set.

        rows: indices of the files. names, speakers: one for each of all files; speakers ascend within rows.
        phones: labels by name, for any of the files. Without labels for any file in rows, the set has no phones.
        """
        taken = [row for row in rows if self.lengths[row]]
        lengths = self.lengths[taken]
        begin = int(self.lengths[: rows.start].sum())
        none = np.empty(0, np.int16)
        labels = [(phones or {}).get(names[row], none)[: label_count(int(self.lengths[row]))] for row in taken]
        known = any(map(len, labels))
        return WaveformSet(
            samples=self.samples[begin : begin + int(lengths.sum())],
            starts=np.append(0, np.cumsum(lengths, dtype=np.int64)),
            names=[names[row] for row in taken],
            speakers=None if speakers is None else np.array([speakers[row] for row in taken], np.int64),
            phones=np.concatenate(labels) if known else None,
            phone_starts=np.cumsum([0, *map(len, labels)], dtype=np.int64) if known else None,
        )


def decoded_recordings(
    root: Path,
    training: Sequence[TreeFile],
    testing: Sequence[TreeFile],
    left_out: LeftOut,
    notes: list[str],
    *,
    variant: str,
) -> DecodedRecordings:
    """Decode files below root, or open them from the cache; training files come before testing files.

    left_out: receives the files that could not be decoded. notes: receives other remarks. variant: the data set's name.

    Raises ImportError if a library is missing, ValueError if no training file could be decoded, OSError if the cache
    cannot be written.
    """
    files = [*training, *testing]
    cache = DecodedCache(
        root=root,
        files=files,
        what="recordings",
        form=[variant, FORMAT, library("soxr").__version__],
        reader=reader(),
        variant=variant,
    )
    kept = cache.kept(_build)
    for number, reason in kept.reasons.items():
        left_out.add(files[number].path, reason)
    lengths = np.array(kept.index["lengths"], np.int64)
    if not lengths[: len(training)].any():
        none = f"{root}: none of the {len(training)} training recordings could be read"
        raise ValueError("\n  ".join([none, *left_out.lines()]))
    cut_off = [files[number].path for number in kept.index["cut_off"]]
    if cut_off:
        notes.append(f"samples beyond -1 to 1 were cut off in {len(cut_off)} files of floating point: {some(cut_off)}")
    return DecodedRecordings(files, np.memmap(kept.file, dtype=np.int16, mode="r"), lengths)


def fitting_labels(
    decoded: DecodedRecordings, names: Sequence[str], phones: dict[str, np.ndarray], notes: list[str]
) -> dict[str, np.ndarray]:
    """Return the labels whose number differs from their recording's grid by at most two.

    The notes name the others, and recordings without labels.
    """
    fitting, others, without = {}, [], []
    for name, length in zip(names, decoded.lengths.tolist(), strict=True):
        if length and name not in phones:
            without.append(name)
        elif length:
            if abs(len(phones[name]) - label_count(length)) <= _LABELS_OFF:
                fitting[name] = phones[name]
            else:
                others.append(f"{name} ({len(phones[name])} for {label_count(length)})")
    if others:
        notes.append(f"labels of phones are not as many as the recording has frames of 10 ms: {some(others)}")
    if without:
        there = int(np.count_nonzero(decoded.lengths))
        notes.append(f"{len(without)} of {there} recordings have no labels of phones: {some(without)}")
    return fitting


def _build(target: Path, files: list[Path]) -> tuple[dict[str, Any], dict[int, str]]:
    with target.open("wb") as out:
        done = decode_files(files, out)
        out.flush()
        os.fsync(out.fileno())
    return {"lengths": done.lengths, "cut_off": done.cut_off}, done.reasons
