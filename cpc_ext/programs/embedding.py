"""The work of `python -m cpc_ext.embed`: write a file with the encodings of images by a run's encoder.

Images of a folder are decoded by threads, a batch ahead of the encoder, and not kept. The file appears complete or not
at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from cpc_ext.data import Dataset, ImageSet, load_dataset
from cpc_ext.data.images.decode import decode_stream
from cpc_ext.data.images.folders.folder import image_files
from cpc_ext.data.images.simclr_view import luma
from cpc_ext.data.notice import LeftOut
from cpc_ext.data.npy_file import write_npy
from cpc_ext.data_sets import origin
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.programs.embed import Command
from cpc_ext.programs.embedding_speech import embed_speech
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import TrainingError, warn, writing
from cpc_ext.training.precision import check_device
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.safetensors_file import write_safetensors

__all__ = ["embed"]

_BATCH = 50
# How long to wait for the lock of another process that renames its two files, which takes milliseconds.
_PATIENCE_SECONDS = 60


def embed(command: Command) -> None:
    """Embed images or recordings as the command says. Raises TrainingError if that is not possible."""
    if RunDir(command.run).medium == "audio":
        embed_speech(command)
        return
    device = check_device(command.device)
    out = command.out or command.run / "features.npy"
    run = EncoderRun.open(command.run, device)
    names = out.with_suffix(".names.json") if out.suffix == ".npy" else None
    images = _FolderImages(command, run) if command.dataset == "folder" else _DatasetImages(command, run)
    # Open the files first, so that a folder that cannot be written to is reported before the work.
    with writing(out, "--out"), ExitStack() as files:
        lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=_PATIENCE_SECONDS)
        files.callback(lock.release)
        # The stack exits in reverse order, so the file of encodings appears before that of names.
        names_file = files.enter_context(atomic_file(names)) if names else None
        file = files.enter_context(atomic_file(out))
        features = _encode(command, run, images, device)
        _write(file, names_file, features, images.names)
        if names:
            # Remove old names first: encodings without names are harmless, encodings with wrong names are not.
            lock.acquire()
            names.unlink(missing_ok=True)
    shape = " x ".join(map(str, features.shape))
    print(
        f"encodings of {len(features)} images, {shape}, are in {out}" + (f", their names in {names}" if names else "")
    )


def _encode(command: Command, run: EncoderRun, images: _FolderImages | _DatasetImages, device: torch.device) -> Tensor:
    """Return the encodings of all images that can be read, float32 [N, D] or [N, D, rows, cols] on the CPU."""
    task = run.trained(run.stand_in(images.source, images.sample))
    encode = task.encodings if command.per_patch else task.features
    with tqdm(total=images.count, unit="image", dynamic_ncols=True) as bar:
        features = []
        for batch, done in images.batches(device):
            if len(batch):
                features.append(encode(task.model, batch).cpu())
            bar.update(done)
    if not features:
        raise TrainingError(f"{images.source}: none of the {images.count} images could be read")
    return torch.cat(features)


class _FolderImages:
    """All images below a folder, resized to one size, and converted to grey if the run's are grey.

    Attributes:
        source: the folder, for messages.
        sample: an empty set of images of the same shape.
        count: number of files.
        names: names of the files that could be read, complete when :meth:`batches` is exhausted.
    """

    def __init__(self, command: Command, run: EncoderRun) -> None:
        assert command.data_dir is not None  # The command line has checked this.
        self._root = command.data_dir.expanduser()
        self.source = str(self._root)
        try:
            self._paths = image_files(self._root)
        except (OSError, ValueError) as error:
            raise TrainingError(f"--data-dir: {error}") from None
        self.count = len(self._paths)
        self.names: list[str] = []
        channels, height, width = run.statistics()["image_shape"]
        if channels not in (1, 3):
            raise TrainingError(
                f"{run.dir.path} was trained on images of {channels} channels, those of a folder have 3"
            )
        self._gray = channels == 1
        self._size = (height, width) if command.image_size is None else (command.image_size, command.image_size)
        self.sample = ImageSet(images=np.empty((0, channels, *self._size), np.uint8))

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        """Yield batches of images, uint8 [B, C, H, W] on the device, each with the number of files processed.

        A batch has fewer images than files if some files cannot be read.
        """
        start = 0
        files = [self._root / path for path in self._paths]
        left_out = LeftOut()
        for pixels, indices, reasons in decode_stream(files, self._size, _BATCH):
            self.names += [self._paths[index] for index in indices]
            for index, reason in reasons.items():
                left_out.add(self._paths[index], reason)
            done = min(_BATCH, self.count - start)
            start += done
            images = torch.from_numpy(pixels).to(device)
            yield luma(images.float()).round().byte() if self._gray else images, done
        if left_out:
            warn("\n  ".join([f"{self.source}:", *left_out.lines()]))


class _DatasetImages:
    """The images of one split of a data set, or of all; the attributes are those of :class:`_FolderImages`.

    Images that have file names are sorted by these, no matter which of them were held out for testing.
    """

    def __init__(self, command: Command, run: EncoderRun) -> None:
        own = origin(command.dataset).folder in ("folders", "arrays")
        size = command.image_size
        if own and size is None:
            # The size of the run's own images, such as images of 28 pixels that were enlarged for its crop.
            _, height, width = run.statistics()["image_shape"]
            size = height if height == width else None
        try:
            dataset = load_dataset(command.dataset, command.data_dir, image_size=size)
        except (ImportError, OSError, ValueError) as error:
            raise TrainingError(f"--dataset {command.dataset}: {error}") from None
        assert isinstance(dataset, Dataset)  # The command line has checked this.
        split = command.split or ("all" if own else "train")
        parts = _parts(dataset)
        if split not in ("all", *parts):
            raise TrainingError(f"--split: {command.dataset} has no {split} images, but {', '.join(parts)}, all")
        chosen = parts if split == "all" else {split: parts[split]}
        named = [
            (f"{part}/{number}" if images.paths is None else images.paths[number], (images.images, number))
            for part, images in chosen.items()
            for number in range(len(images))
        ]
        if all(images.paths is not None for images in chosen.values()):
            named.sort(key=lambda pair: _by_numbers(pair[0]))
        self.source = command.dataset
        self.sample = next(iter(chosen.values()))
        self.count = len(named)
        self.names = [name for name, _ in named]
        self._places = [place for _, place in named]

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        for start in range(0, self.count, _BATCH):
            rows = [images[number] for images, number in self._places[start : start + _BATCH]]
            yield torch.from_numpy(np.stack(rows)).to(device), len(rows)


def _parts(dataset: Dataset) -> dict[str, ImageSet]:
    """Return the distinct parts of a data set, by name."""
    found: dict[str, ImageSet] = {}
    for name, images in (("train", dataset.train), ("pretrain", dataset.pretrain), ("test", dataset.test)):
        if images is not None and all(images is not other for other in found.values()):
            found[name] = images
    return found


def _by_numbers(name: str) -> list[str | int]:
    """Return a key that sorts names by the numbers in them: x[9] before x[10]."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", name))]


def _write(file: BinaryIO, names_file: BinaryIO | None, features: Tensor, names: list[str]) -> None:
    # JSON in ASCII, because file names may contain bytes that are not valid text in any encoding.
    listed = json.dumps(names)
    if names_file is None:
        write_safetensors(file, {"features": features.contiguous()}, {"format": "pt", "names": listed})
    else:
        write_npy(file, features.numpy())
        names_file.write(listed.encode())
        # Sync both files while both can still be discarded, so that a full disk leaves neither without the other.
        for each in (file, names_file):
            each.flush()
            os.fsync(each.fileno())
