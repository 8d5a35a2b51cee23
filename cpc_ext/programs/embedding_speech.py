"""The work of `python -m cpc_ext.embed` with a run on speech: write a file of frames for each recording in a folder.

Recordings are decoded one at a time and not kept. Each file appears complete or not at all, so that the files of an
interrupted program are valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cpc_ext.data import SAMPLE_RATE, SpeechDataset, WaveformSet
from cpc_ext.data.audio.decode import decode_or_reason, read_recordings
from cpc_ext.data.notice import LeftOut
from cpc_ext.data.npy_file import write_npy
from cpc_ext.evaluation.encoder_run import SpeechRun
from cpc_ext.programs.embed import Command
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import TrainingError, warn, writing
from cpc_ext.training.precision import check_device

__all__ = ["embed_speech"]

# Suffix that is added to the name of a recording's file of frames to name its file of times.
_TIMES = ".times"


def embed_speech(command: Command) -> None:
    """Embed recordings as the command says. Raises TrainingError if that is not possible."""
    if command.dataset not in ("folder", "audio-folder"):
        raise TrainingError(f"--dataset: a run on speech embeds the recordings of a folder, got {command.dataset}")
    if command.data_dir is None:
        raise TrainingError("--data-dir: name the folder of recordings")
    run = SpeechRun.open(command.run, check_device(command.device))
    root = command.data_dir.expanduser()
    try:
        tree = read_recordings(root, splits=False)
    except (ImportError, OSError, ValueError) as error:
        raise TrainingError(f"--data-dir: {error}") from None
    nothing = WaveformSet(np.empty(0, np.int16), np.zeros(1, np.int64), ())
    task = run.trained(SpeechDataset("none", nothing, None))
    try:
        make = task.frames(task.model, command.layer)
    except ValueError as error:
        raise TrainingError(f"--layer: {str(error).removeprefix('layer: ')}") from None
    out = command.out or command.run / "frames"
    written, dim, left_out = 0, 0, LeftOut("recordings")
    stems = _stems([file.path for file in tree.train])
    for file in tqdm(tree.train, unit="recording", dynamic_ncols=True):
        found = decode_or_reason(root / file.path)
        if isinstance(found, str):
            left_out.add(file.path, found)
            continue
        frames, centers = make(torch.from_numpy(np.array(found.samples)))
        if not len(frames):
            left_out.add(file.path, "too short for a frame")
            continue
        with writing(out, "--out"):
            _write(out / stems[file.path], frames, centers.double() / SAMPLE_RATE, command.format)
        written, dim = written + 1, frames.shape[1]
    if left_out or tree.left_out:
        warn("\n  ".join([f"{root}:", *tree.left_out.lines(), *left_out.lines()]))
    if not written:
        raise TrainingError(f"{root}: none of the {len(tree.train)} recordings could be read")
    print(f"frames of {dim} values of {written} recordings are in {out}, a file for each")


def _stems(paths: Sequence[str]) -> dict[str, str]:
    """Return the stem of the output files of each recording.

    A recording keeps its own file ending in the stem if the stem without it would clash with another recording's name
    or output file.
    """
    plain = {path: str(Path(path).with_suffix("")) for path in paths}
    counts = Counter([*plain.values(), *paths])

    def taken(stem: str) -> bool:
        return counts[stem] > 1 or (stem.endswith(_TIMES) and stem.removesuffix(_TIMES) in counts)

    return {path: path if taken(stem) else stem for path, stem in plain.items()}


def _write(stem: Path, frames: Tensor, times: Tensor, form: str) -> None:
    """Write frames [L, D] and their times [L] in seconds to files with this stem."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if form == "text":
        with atomic_file(stem.with_name(f"{stem.name}.txt")) as file:
            rows = np.column_stack([times.numpy(), frames.numpy()])
            np.savetxt(file, rows, fmt=["%.5f"] + ["%.6g"] * frames.shape[1])
        return
    with atomic_file(stem.with_name(f"{stem.name}{_TIMES}.npy")) as file:
        write_npy(file, times.numpy())
    with atomic_file(stem.with_name(f"{stem.name}.npy")) as file:
        write_npy(file, frames.numpy())
