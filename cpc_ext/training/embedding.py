"""The program `python -m cpc_ext.embed`: from a run's folder and images to a file of their encodings.

Images of a folder are decoded by threads, a batch ahead of the encoder, and never kept. The file appears complete or
not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from cpc_ext.data import ImageFetcher, ImageSet, load_dataset
from cpc_ext.data.decode import decode_stream
from cpc_ext.data.folder import image_files
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.config import DatasetName
from cpc_ext.training.encoder_run import EncoderRun
from cpc_ext.training.errors import TrainingError, exit_status, warn
from cpc_ext.training.precision import check_device, default_device
from cpc_ext.training.safetensors_file import write_safetensors

__all__ = ["main"]

_PROGRAM = "python -m cpc_ext.embed"
_DESCRIPTION = (
    "Write the encodings of images by the encoder of a run: float32, one row an image, in the order of the sorted file "
    "names. A .npy file holds the encodings, and NAME.names.json beside it the file names; a .safetensors file holds "
    'both, the encodings as "features" and the file names as JSON under "names" in its metadata.'
)
_SUFFIXES = (".npy", ".safetensors")
_BATCH = 50


@dataclass(frozen=True)
class _Command:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(help="Folder of images, at any depth; or of another --dataset's files. None: the user's cache."),
    ] = None
    dataset: Annotated[DatasetName, tyro.conf.arg(help="Where the images come from.")] = "folder"
    split: Annotated[
        Literal["pretrain", "train", "test"],
        tyro.conf.arg(help="Which images of a --dataset other than folder; they are named SPLIT/NUMBER."),
    ] = "train"
    image_size: Annotated[
        int | None,
        tyro.conf.arg(
            help="Side in pixels that a folder's images are resized to, their middle cut out, before the run's crop. "
            "None: height and width of the run's own images."
        ),
    ] = None
    per_patch: Annotated[
        bool,
        tyro.conf.arg(
            help="An encoding of every patch, [N, D, rows, cols], in place of their mean, [N, D]. Models of whole "
            "images have one patch."
        ),
    ] = False
    device: Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu"
    out: Annotated[
        Path | None,
        tyro.conf.arg(help="File to write, .npy or .safetensors. None: features.npy in the run's folder."),
    ] = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (default: those of the process); returns the exit status.

    0: done. 1: it could not be done, for a reason that was printed. 2 (raised as SystemExit): wrong options.
    130: Ctrl-C.
    """
    command = tyro.cli(
        _Command,
        prog=_PROGRAM,
        description=_DESCRIPTION,
        args=arguments,
        default=_Command(run=tyro.MISSING, device=default_device()),
    )
    return exit_status(lambda: _embed(command))


def _embed(command: _Command) -> None:
    device = check_device(command.device)
    out = command.out or command.run / "features.npy"
    if out.suffix not in _SUFFIXES:
        raise TrainingError(f"--out: expected a name that ends in {' or '.join(_SUFFIXES)}, got {out.name}")
    run = EncoderRun.open(command.run, device)
    names = out.with_suffix(".names.json") if out.suffix == ".npy" else None
    images = _FolderImages(command, run) if command.dataset == "folder" else _DatasetImages(command)
    try:
        # Opened first: that nothing can be written here is better known before the work than after it.
        with ExitStack() as files:
            file = files.enter_context(atomic_file(out))
            names_file = files.enter_context(atomic_file(names)) if names else None
            features = _encode(command, run, images, device)
            _write(file, names_file, features, images.names)
    except OSError as error:
        raise TrainingError(f"--out: cannot write {out}: {error.strerror or error}") from None
    shape = " x ".join(map(str, features.shape))
    print(
        f"encodings of {len(features)} images, {shape}, are in {out}" + (f", their names in {names}" if names else "")
    )


def _encode(command: _Command, run: EncoderRun, images: _FolderImages | _DatasetImages, device: torch.device) -> Tensor:
    """Encodings of all images that can be read, float32 [N, D] or [N, D, rows, cols] on the CPU."""
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
    """All images below a folder, resized to one size.

    source: where they come from. sample: images of the same shape. count: how many files there are. names: of those
    that could be read, known when :meth:`batches` is through.
    """

    def __init__(self, command: _Command, run: EncoderRun) -> None:
        if command.data_dir is None:
            raise TrainingError("--data-dir: name the folder of images")
        if command.image_size is not None and command.image_size < 1:
            raise TrainingError(f"--image-size: at least 1, got {command.image_size}")
        self._root = command.data_dir.expanduser()
        self.source = str(self._root)
        try:
            self._paths = image_files(self._root)
        except (OSError, ValueError) as error:
            raise TrainingError(f"--data-dir: {error}") from None
        self.count = len(self._paths)
        self.names: list[str] = []
        channels, height, width = run.statistics()["image_shape"]
        if channels != 3:
            raise TrainingError(
                f"{run.dir.path} was trained on images of {channels} channels, those of a folder have 3"
            )
        self._size = (height, width) if command.image_size is None else (command.image_size, command.image_size)
        self.sample = ImageSet(images=np.empty((0, channels, *self._size), np.uint8))

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        """Batches of images, uint8 [B, C, H, W] on the device, with the number of files that each is of."""
        start = 0
        for pixels, indices in decode_stream([self._root / path for path in self._paths], self._size, _BATCH):
            self.names += [self._paths[index] for index in indices]
            files = min(_BATCH, self.count - start)
            start += files
            yield torch.from_numpy(pixels).to(device), files
        broken = sorted(set(self._paths) - set(self.names))
        if broken:
            shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
            warn(f"{self.source}: left out {len(broken)} images that could not be read: {shown}")


class _DatasetImages:
    """The images of a split of a data set; as :class:`_FolderImages`."""

    def __init__(self, command: _Command) -> None:
        if command.image_size is not None and command.dataset != "textures":
            raise TrainingError(f"--image-size: the images of {command.dataset} have a size of their own")
        try:
            dataset = load_dataset(command.dataset, command.data_dir, image_size=command.image_size)
        except (OSError, ValueError) as error:
            raise TrainingError(f"--dataset {command.dataset}: {error}") from None
        images = getattr(dataset, command.split)
        if images is None:
            raise TrainingError(f"--split: {command.dataset} has no {command.split} images")
        self.source = command.dataset
        self.sample: ImageSet = images
        self.count = len(images)
        self.names = [f"{command.split}/{number}" for number in range(self.count)]

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        fetch = ImageFetcher(self.sample, device, resident=False)
        for start in range(0, self.count, _BATCH):
            indices = np.arange(start, min(start + _BATCH, self.count))
            yield fetch(indices), len(indices)


def _write(file: BinaryIO, names_file: BinaryIO | None, features: Tensor, names: list[str]) -> None:
    # ASCII, as a file name may hold bytes that are no text in any encoding.
    listed = json.dumps(names)
    if names_file is None:
        write_safetensors(file, {"features": features.contiguous()}, {"format": "pt", "names": listed})
    else:
        # As numpy.save does, which however takes no notice of a disk that is full.
        array = np.ascontiguousarray(features.numpy())
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
        names_file.write(listed.encode())
        # While both can still be taken back: neither is to appear without the other.
        file.flush()
        names_file.flush()
