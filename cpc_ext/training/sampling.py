"""The program `python -m cpc_ext.sample`: from a run's folder to a PNG of images drawn from its model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from cpc_ext.data.decode import decode_image
from cpc_ext.models.pixel_model import PixelModel
from cpc_ext.models.pixel_sampler import NotFiniteError
from cpc_ext.training import figures
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.errors import TrainingError, exit_status
from cpc_ext.training.pixelcnn import PIXEL_MODELS, build_pixel_model
from cpc_ext.training.precision import check_device, default_device
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.weight_average import averaged_weights

__all__ = ["main"]

_PROGRAM = "python -m cpc_ext.sample"
_DESCRIPTION = (
    "Draw images from a PixelCNN that python -m cpc_ext.train has trained, or complete the lower part of an image. "
    "Every value is drawn given all before it, at the cost of what it adds."
)

# Drawn together: what is kept of an image takes some megabytes a layer.
_BATCH = 16


@dataclass(frozen=True)
class _Command:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    n: Annotated[int, tyro.conf.arg(help="Images to draw.")] = 64
    class_index: Annotated[
        int | None,
        tyro.conf.arg(
            name="class",
            help="Class to draw, a number from 0; of a model trained with --class-conditional. None: each "
            "class in turn.",
        ),
    ] = None
    temperature: Annotated[
        float,
        tyro.conf.arg(help="Below 1 the probable becomes more so; 0 always takes the most probable value."),
    ] = 1.0
    complete: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Image whose first --rows are kept and the rest drawn, n times. It is resized, and its middle cut "
            "out, to the size of the run's images; it comes first in the result."
        ),
    ] = None
    rows: Annotated[int | None, tyro.conf.arg(help="Rows of --complete to keep. None: the upper half.")] = None
    seed: Annotated[int, tyro.conf.arg(help="Determines the draws.")] = 0
    device: Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu"
    out: Annotated[
        Path | None, tyro.conf.arg(help="The PNG to write. None: sampled.png or completed.png in the run's folder.")
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
    return exit_status(lambda: _sample(command), errors=(TrainingError, NotFiniteError))


def _sample(command: _Command) -> None:
    device = check_device(command.device)
    if command.n < 1:
        raise TrainingError(f"--n: at least 1, got {command.n}")
    if not 0 <= command.temperature < float("inf"):
        raise TrainingError(f"--temperature: at least 0 and finite, got {command.temperature:g}")
    run = RunDir(command.run)
    model, description = _load(run)
    model.to(device).eval()
    shape = tuple(description["image_shape"])
    labels = _labels(command, model, description)
    image, rows = _image_to_complete(command, shape)
    generator = torch.Generator(device).manual_seed(command.seed)
    batches = []
    for first in range(0, command.n, _BATCH):
        count = min(_BATCH, command.n - first)
        name = f"images {first + 1} to {first + count} of {command.n}"
        batches.append(
            model.sample(
                count,
                shape[1:],
                labels=None if labels is None else labels[first : first + count],
                temperature=command.temperature,
                images=None if image is None else image.expand(count, *shape),
                known_rows=rows,
                generator=generator,
                progress=lambda rows, name=name: tqdm(rows, desc=name, unit="row", dynamic_ncols=True),
            ).cpu()
        )
    images = torch.cat(batches)
    if image is not None:
        images = torch.cat([image.unsqueeze(0).cpu(), images])
    path = command.out or command.run / ("sampled.png" if image is None else "completed.png")
    try:
        figures.save_images(path, images.numpy())
    except OSError as error:
        raise TrainingError(f"--out: cannot write {path}: {error.strerror or error}") from None
    print(f"{command.n} images of {shape[2]} x {shape[1]} pixels are in {path}")


def _load(run: RunDir) -> tuple[PixelModel, dict[str, Any]]:
    """The run's model and its description: of the finished run, else of its last checkpoint."""
    if not run.config.is_file():
        raise TrainingError(f"{run.path} is not a run's folder: there is no {run.config.name}")
    name = load_config(run.config).model
    if name not in PIXEL_MODELS:
        raise TrainingError(f"{run.path} is a run of {name}; samples are drawn from {' or '.join(PIXEL_MODELS)}")
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
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise TrainingError(f"{source} is of another model than {name}") from None
    return model, description


def _read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return json.loads((file.metadata() or {}).get("description", "{}")), weights
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError):
        raise TrainingError(f"{path} is damaged") from None


def _labels(command: _Command, model: PixelModel, description: dict[str, Any]) -> Tensor | None:
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


def _image_to_complete(command: _Command, shape: tuple[int, int, int]) -> tuple[Tensor | None, int]:
    """The image, uint8 [C, H, W], and how many of its rows are kept; None and 0 where none is given."""
    channels, height, width = shape
    if command.complete is None:
        if command.rows is not None:
            raise TrainingError("--rows needs --complete, the image whose rows are kept")
        return None, 0
    rows = height // 2 if command.rows is None else command.rows
    if not 0 <= rows <= height:
        raise TrainingError(f"--rows: 0 to {height}, the height of the run's images, got {rows}")
    try:
        pixels = decode_image(command.complete)
    except FileNotFoundError:
        raise TrainingError(f"--complete: there is no {command.complete}") from None
    except Exception as error:
        # Pillow's readers raise nearly anything for a damaged file.
        raise TrainingError(f"--complete: {command.complete} is not an image that can be read ({error})") from None
    picture = Image.fromarray(pixels)
    if picture.size != (width, height):
        print(
            f"{command.complete} has {picture.width} x {picture.height} pixels: resized, and its middle cut out, to "
            f"the {width} x {height} of the run's images"
        )
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    pixels = np.array(picture.convert("L"))[..., None] if channels == 1 else np.array(picture)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), rows
