"""The work of `python -m cpc_ext.sample`: draw images from a run's model and write them as PNG or array."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from cpc_ext import figures
from cpc_ext.data.images.decode import decode_image, resized
from cpc_ext.data.npy_file import write_npy
from cpc_ext.models.pixels.pixel_model import PixelModel
from cpc_ext.models.pixels.pixel_sampler import IMAGE_LEVELS, NotFiniteError
from cpc_ext.programs.sample import Command
from cpc_ext.tasks.pixel_task import PixelTask, build_pixel_model, shown
from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.checkpoint import load_checkpoint, load_weights
from cpc_ext.training.errors import TrainingError, writing
from cpc_ext.training.precision import check_device
from cpc_ext.training.registry import MODELS, task_class
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.weight_average import averaged_weights

__all__ = ["sample"]

# Number of images drawn at a time: the cached state of an image takes some megabytes per layer.
_BATCH = 16


def sample(command: Command) -> None:
    """Draw images as the command says. Raises TrainingError if that is not possible."""
    device = check_device(command.device)
    run = RunDir(command.run)
    model, description = _load(run)
    model.to(device).eval()
    shape = _image_shape(description)
    labels = _labels(command, model, description)
    image, rows = _image_to_complete(command, shape, model.levels)
    generator = torch.Generator(device).manual_seed(command.seed)
    batches = []
    for first in range(0, command.n, _BATCH):
        count = min(_BATCH, command.n - first)
        name = f"images {first + 1} to {first + count} of {command.n}"
        try:
            drawn = model.sample(
                count,
                shape[1:],
                labels=None if labels is None else labels[first : first + count],
                temperature=command.temperature,
                images=None if image is None else image.expand(count, *shape),
                known_rows=rows,
                generator=generator,
                progress=partial(tqdm, desc=name, unit="row", dynamic_ncols=True),
            )
        except NotFiniteError as error:
            raise TrainingError(f"{command.run}: {error}") from None
        batches.append(drawn.cpu())
    images = torch.cat(batches)
    if image is not None:
        images = torch.cat([image.unsqueeze(0).cpu(), images])
    suffix = "npy" if model.levels != IMAGE_LEVELS else "png"
    path = command.out or command.run / f"{'sampled' if image is None else 'completed'}.{suffix}"
    with writing(path, "--out"):
        if path.suffix.lower() == ".npy":
            with atomic_file(path) as file:
                write_npy(file, images.numpy())
        else:
            figures.save_images(path, shown(model, images.numpy()))
    print(f"{command.n} images of {shape[2]} x {shape[1]} pixels are in {path}")


def _load(run: RunDir) -> tuple[PixelModel, dict[str, Any]]:
    """Load the run's model and its description from the finished run, else from its last checkpoint."""
    name = run.known_config.model
    if not issubclass(task_class(name), PixelTask):
        having = " or ".join(each for each in MODELS if issubclass(task_class(each), PixelTask))
        raise TrainingError(f"{run.path} is a run of {name}; samples are drawn from {having}")
    if run.model.is_file():
        source = run.model
        description, weights = _read_model(run.model)
    else:
        source = run.checkpoint
        if not source.is_file():
            raise TrainingError(f"there is neither {run.model.name} nor {run.checkpoint.name} in {run.path}")
        state = load_checkpoint(source)
        description, weights = (
            state.get("description", {}),
            averaged_weights(state.get("task", {})) or state.get("model", {}),
        )
    try:
        model = build_pixel_model(description)
        load_weights(model, weights)
        channels, height, width = _image_shape(description)
        if channels != model.in_channels:
            raise ValueError(f"images of {channels} channels, a model of {model.in_channels}")
        model.check_size(height, width)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise TrainingError(f"{source} is of another model than {name}") from None
    return model, description


def _read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return json.loads((file.metadata() or {}).get("description", "{}")), weights
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RecursionError):
        raise TrainingError(f"{path} is damaged") from None


def _image_shape(description: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) from a description. Raises KeyError, TypeError or ValueError if it has no valid shape."""
    channels, height, width = description["image_shape"]
    if any(type(side) is not int or side < 1 for side in (channels, height, width)):
        raise ValueError(f"image_shape: expected [C, H, W], got {description['image_shape']}")
    return channels, height, width


def _labels(command: Command, model: PixelModel, description: dict[str, Any]) -> Tensor | None:
    if model.num_classes is None:
        if command.class_index is not None:
            raise TrainingError("--class: the model was trained without classes (--class-conditional)")
        return None
    if command.class_index is None:
        return torch.arange(command.n) % model.num_classes
    if not 0 <= command.class_index < model.num_classes:
        names = ", ".join(f"{number} {name}" for number, name in enumerate(description["classes"]))
        raise TrainingError(f"--class: 0 to {model.num_classes - 1}, got {command.class_index}; they are {names}")
    return torch.full((command.n,), command.class_index)


def _image_to_complete(command: Command, shape: tuple[int, int, int], levels: int) -> tuple[Tensor | None, int]:
    """Return the image to complete, [C, H, W], and the number of its rows to keep; None and 0 if none is given."""
    channels, height, width = shape
    if command.complete is None:
        return None, 0
    rows = height // 2 if command.rows is None else command.rows
    if not 0 <= rows <= height:
        raise TrainingError(f"--rows: 0 to {height}, the height of the run's images, got {rows}")
    if command.complete.suffix == ".npy":
        return _array_to_complete(command.complete, shape, levels), rows
    if levels != IMAGE_LEVELS:
        raise TrainingError(f"--complete: the run is of codes, which come in a .npy file, got {command.complete}")
    try:
        pixels = decode_image(command.complete)
    except FileNotFoundError:
        raise TrainingError(f"--complete: there is no {command.complete}") from None
    except Exception as error:
        # Pillow's readers may raise nearly anything for a damaged file.
        raise TrainingError(f"--complete: {command.complete} is not an image that can be read ({error})") from None
    picture = Image.fromarray(pixels)
    if picture.size != (width, height):
        print(
            f"{command.complete} has {picture.width} x {picture.height} pixels: resized, and its middle cut out, to "
            f"the {width} x {height} of the run's images"
        )
        picture = Image.fromarray(resized(picture, (height, width)))
    pixels = np.array(picture.convert("L"))[..., None] if channels == 1 else np.array(picture)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), rows


def _array_to_complete(path: Path, shape: tuple[int, int, int], levels: int) -> Tensor:
    """Read an array [C, H, W] from a file, with the dtype of the model's samples."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise TrainingError(f"--complete: there is no {path}") from None
    except (EOFError, OSError, ValueError) as error:
        raise TrainingError(f"--complete: {path} is not an array that can be read ({error})") from None
    if array.shape != shape or array.dtype.kind not in "iu":
        found = f"{array.dtype} {list(array.shape)}"
        raise TrainingError(f"--complete: integers {list(shape)} are wanted, {path} holds {found}")
    if array.min() < 0 or array.max() >= levels:
        raise TrainingError(f"--complete: values 0 to {levels - 1}, {path} holds {array.min()} to {array.max()}")
    return torch.from_numpy(array.astype(np.uint8 if levels <= IMAGE_LEVELS else np.int64))
