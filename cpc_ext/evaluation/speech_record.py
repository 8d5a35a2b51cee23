"""The results of evaluating a run on speech, as measured.json: a row for every kind of frames and measure."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import numpy as np

from cpc_ext.data import SpeechDataset, WaveformSet
from cpc_ext.evaluation.evaluation_record import EvaluationRecord

__all__ = ["SpeechRecord", "recordings_digest"]


class SpeechRecord(EvaluationRecord):
    """measured.json, with the rows that are still valid; see :class:`EvaluationRecord`."""

    names = ("frames", "measure")
    entries: ClassVar[dict[str, Any]] = {
        "frames": str,
        "measure": str,
        "found": dict,
        "left_out": list,
        "settings": dict,
        "confusion": list,
    }
    order = names
    examples = "recordings"


def recordings_digest(dataset: SpeechDataset, waveforms: WaveformSet, chosen: np.ndarray) -> str:
    """Return a hexadecimal hash of all samples and labels of chosen recordings."""
    digest = hashlib.sha256(repr((len(chosen), dataset.speakers, dataset.phone_names, dataset.sample_rate)).encode())
    if waveforms.speakers is not None:
        digest.update(np.ascontiguousarray(waveforms.speakers[chosen]).data)
    for index in map(int, chosen):
        parts = [waveforms.recording(index)] + ([] if waveforms.phones is None else [waveforms.phones_of(index)])
        for part in parts:
            digest.update(f"{part.dtype} {len(part)}\n".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]
