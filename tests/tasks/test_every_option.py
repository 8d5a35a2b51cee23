"""Every option of `python -m cpc_ext.train` has the effect that its help states.

The table at the end has an entry for every option of every model, so that a new option fails here until it has one.
Tests check the inputs of networks and optimizer, and the content of files, on models of a few channels.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cpc_ext.data import DATASETS, Dataset, ImageSet
from cpc_ext.data_sets import medium
from cpc_ext.measures.probe import ProbeResult
from cpc_ext.models import (
    CPC,
    GatedPixelCNN,
    GatedPixelCNNContext,
    GreedyInfoMax,
    GreedySupervised,
    MoCo,
    PixelCNN,
    PixelCNNPP,
    ResidualContext,
    ResNetV2Encoder,
    SimCLR,
    SupCon,
    WideResNetEncoder,
)
from cpc_ext.nn import GridInfoNCE, MoCoLoss, NTXentLoss, SupConLoss, TargetInfoNCE
from cpc_ext.programs import training as program
from cpc_ext.programs.train_options import Command, parse
from cpc_ext.tasks import encoder_task
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.training import registry, run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import RunConfig, option, validate_config
from cpc_ext.training.distribution import Ranks, joined_ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loop import Trainer
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.registry import config_class, task_class
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog, read_metrics
from cpc_ext.training.stop_request import StopRequest
from cpc_ext.training.task import Task

CPU = torch.device("cpu")
# The models of images; test_speech_tasks.py tests those of speech.
MODELS = tuple(model for model in registry.MODELS if registry.model_medium(model) == "images")
# Multiples of 8: on CPUs without AVX-512 oneDNN's backward pass of a channels-last 1x1 convolution of stride 2 from 4
# to 6 channels writes past its buffers (PyTorch 2.13).
ENCODER = "resnet:blocks=1-1-1,channels=8-8-16,stem_channels=8,stem=cifar"
_CPC = {
    "view": {"crop": 24, "grid_size": 5, "flip": False},
    "cpc": {"encoder": ENCODER, "norm": "none", "context_layers": 1, "pred_steps": 2, "pred_directions": 1},
    "optimization": {"steps": 4, "batch_size": 4},
}
_PIXELS = {"pixelcnn": {"layers": 1, "hidden_channels": 6}, "optimization": {"steps": 4, "batch_size": 4}}
_TWO_VIEWS = {"encoder": ENCODER, "view_size": 32, "blur_kernel": 0, "projection_channels": 8}
BASE: dict[str, dict[str, Any]] = {
    "cpc-v1": _CPC,
    "cpc-v2": {**_CPC, "cpc": {**_CPC["cpc"], "context_channels": 8, "target_channels": 8}},
    "greedy-infomax": _CPC,
    "simclr": {
        "simclr": _TWO_VIEWS,
        "optimization": {"steps": 4, "batch_size": 4},
    },
    "moco": {"moco": {**_TWO_VIEWS, "queue_size": 16}, "optimization": {"steps": 4, "batch_size": 4}},
    "supcon": {"supcon": _TWO_VIEWS, "optimization": {"steps": 4, "batch_size": 4}},
    "pixelcnn": _PIXELS,
    "gated-pixelcnn": _PIXELS,
    "pixelcnn++": {**_PIXELS, "pixelcnn": {**_PIXELS["pixelcnn"], "mixtures": 2, "data_init": False}},
}
WITH_ENCODER = tuple(model for model in MODELS if issubclass(task_class(model), EncoderTask))
TWO_VIEWS = ("simclr", "moco", "supcon")
# Sections whose options only the loop uses, for any model.
SHARED = ("data", "optimization", "compute", "output")


def sections_of(model: str) -> dict[str, str]:
    """Every option of a model's runs, with its section."""
    return {
        name: section
        for section, field in config_class(model).model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for name in field.annotation.model_fields
    }


def config_of(model: str, **options: Any) -> RunConfig:
    tree = copy.deepcopy(BASE[model])
    for name, value in options.items():
        tree.setdefault(sections_of(model)[name], {})[name] = value
    return validate_config({"model": model, **tree})


def dataset_of(images: np.ndarray | Tensor, labels: int | None = 2) -> Dataset:
    """Return a data set whose splits are all these images, uint8 [N, C, H, W], with classes in turn."""
    images = np.asarray(images)
    numbers = None if labels is None else np.arange(len(images), dtype=np.int64) % labels
    split = ImageSet(images, numbers)
    return Dataset(
        name="textures",
        pretrain=split,
        train=split,
        test=split,
        classes=tuple(map(str, range(labels or 0))),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        gray_mean=0.5,
        gray_std=0.2,
    )


def noise(count: int = 4, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def columns(count: int = 16, side: int = 32) -> np.ndarray:
    """Return images whose values are 7 times the number of the column."""
    return np.broadcast_to((7 * np.arange(side)).astype(np.uint8), (count, 3, side, side)).copy()


def task_of(model: str, images: np.ndarray | None = None, **options: Any) -> Task:
    return task_class(model)(config_of(model, **options), dataset_of(noise() if images is None else images), CPU)


def step(task: Task, *, seed: int = 0) -> dict[str, Tensor]:
    """Run a forward pass as the training loop does, on all images."""
    labels = None if task.examples.labels is None else torch.from_numpy(task.examples.labels)
    task.model.train()
    return task.losses(torch.from_numpy(task.examples.images), labels, RandomStreams(seed, CPU))


def inputs_of(module: nn.Module, action: Callable[[], object]) -> list[Tensor]:
    """Return the first argument of every call of a module while ``action`` runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    action()
    hook.remove()
    return seen


def outputs_of(module: nn.Module, action: Callable[[], object]) -> Any:
    seen = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    action()
    hook.remove()
    return seen[0]


def first_conv(task: Task) -> nn.Module:
    return next(module for module in task.model.encoder.modules() if isinstance(module, nn.Conv2d))


def seen(task: Task, *, seed: int = 0) -> Tensor:
    """Return the input of the encoder's first convolution in a step: patches [N, C, p, p], or views."""
    return torch.cat(inputs_of(first_conv(task), lambda: step(task, seed=seed)))


def column_of(values: Tensor) -> Tensor:
    """Convert normalised pixels of images of :func:`columns` to the numbers of their columns."""
    return (values.float() * 0.2 + 0.5) * 255 / 7


_CONTRASTS = (GridInfoNCE, TargetInfoNCE, NTXentLoss, MoCoLoss, SupConLoss)


def contrasts(task: Task) -> list[nn.Module]:
    """Return the objectives of a model."""
    return [m for m in task.model.modules() if isinstance(m, _CONTRASTS)]


def modules_of(task: Task, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in task.model.modules() if isinstance(module, kind)]


# The view.


def crop(model: str) -> None:
    for side in (24, 30):
        patches = column_of(seen(task_of(model, columns(), crop=side))).unflatten(0, (16, 5, 5))
        assert patches.shape[-1] == 2 * side // 6
        firsts, lasts = patches.flatten(1).amin(1), patches.flatten(1).amax(1)
        torch.testing.assert_close(lasts - firsts + 1, torch.full((16,), float(side)), atol=0.1, rtol=0)
    assert len(firsts.round().unique()) > 1  # The places are random.
    with pytest.raises(ValueError, match="--crop 36 is larger"):
        task_of(model, columns(), crop=36)


def pad(model: str) -> None:
    white = np.full((16, 3, 32, 32), 255, np.uint8)
    black, full = (0 - 0.5) / 0.2, (1 - 0.5) / 0.2
    assert seen(task_of(model, white, pad=0)).unique().tolist() == pytest.approx([full])
    assert seen(task_of(model, white, pad=8)).unique().tolist() == pytest.approx([black, full])
    assert seen(task_of(model, white, crop=42, pad=5)).shape[-1] == 14


def grid_size(model: str) -> None:
    assert seen(task_of(model, columns(4))).shape[0] == 4 * 5 * 5
    patches = column_of(seen(task_of(model, columns(4), grid_size=7)))
    assert len(patches) == 4 * 7 * 7
    # The seventh patch of a row begins six strides of 3 after the first.
    starts = patches[:7, 0, 0, 0]
    torch.testing.assert_close(starts - starts[0], 3.0 * torch.arange(7), atol=0.1, rtol=0)


def patch_size(model: str) -> None:
    patches = column_of(seen(task_of(model, columns(4), patch_size=4))).unflatten(0, (4, 5, 5))
    assert patches.shape[-2:] == (4, 4)
    starts = patches[0, 0, :, 0, 0, 0]
    torch.testing.assert_close(starts - starts[0], 5.0 * torch.arange(5), atol=0.1, rtol=0)


def flip(model: str) -> None:
    for on in (False, True):
        if "view_size" in sections_of(model):
            views = pixels(model, columns(32), flip=on, jitter_probability=0.0, gray_probability=0.0, blur_kernel=0)
            falling = int((views[:, 0, 0, -1] < views[:, 0, 0, 0]).sum())
            assert len(views) * 0.25 <= falling <= len(views) * 0.75 if on else falling == 0
            continue
        patches = seen(task_of(model, columns(32), flip=on)).unflatten(0, (32, 25))
        falling = int((patches[:, 0, 0, 0, -1] < patches[:, 0, 0, 0, 0]).sum())
        assert 8 <= falling <= 24 if on else falling == 0


def gray(model: str) -> None:
    red = np.zeros((2, 3, 32, 32), np.uint8)
    red[:, 0] = 255
    patches = seen(task_of(model, red, gray=True))
    assert patches.shape[1] == 1
    torch.testing.assert_close(patches, torch.full_like(patches, (0.299 - 0.5) / 0.2), atol=0.02, rtol=0)
    colours = seen(task_of(model, red, gray=False))
    assert [channel.unique().item() for channel in colours.unbind(1)] == pytest.approx([2.5, -2.5, -2.5])


def patch_norm(model: str) -> None:
    """Each patch is divided by its deviation, in units of the whole range, plus 0.02."""
    plain, normalised = (seen(task_of(model, patch_norm=on)).flatten(1) for on in (False, True))
    assert plain.mean(1).abs().max() > 0.1
    assert normalised.mean(1).abs().max() < 1e-4
    deviation = 0.2 * plain.std(1, correction=0)
    torch.testing.assert_close(normalised.std(1, correction=0), deviation / (deviation + 0.02), atol=1e-3, rtol=0)


def patch_augmentation(model: str) -> None:
    plain, augmented = (task_of(model, patch_augmentation=on) for on in (False, True))
    assert not torch.equal(seen(plain), seen(augmented))
    images = torch.from_numpy(noise())
    assert torch.equal(plain.encodings(plain.model, images), augmented.encodings(augmented.model, images))


# Encoders and contrast.


def encoder(model: str) -> None:
    assert isinstance(task_of(model).model.encoder, ResNetV2Encoder)
    assert task_of(model, encoder=ENCODER.replace("8-8-16", "8-8-24")).model.encoder.out_channels == 24
    wide = task_of(model, encoder="wrn-10-1").model.encoder
    assert isinstance(wide, WideResNetEncoder)
    assert wide.out_channels == 64


def norm(model: str) -> None:
    for name, groups in (("none", None), ("layer", lambda channels: 1), ("instance", lambda channels: channels)):
        norms = modules_of(task_of(model, norm=name), nn.GroupNorm)
        assert bool(norms) == (groups is not None)
        assert all(module.num_groups == groups(module.num_channels) for module in norms)
    assert modules_of(task_of(model, norm="batch"), nn.BatchNorm2d)


def gather_negatives(model: str) -> None:
    """test_distribution.py compares the effects of the values, with several processes."""
    if model == "supcon":
        for word in ("none", "gather"):
            assert task_of(model, gather_negatives=word).model.gather_negatives == word
    if model in ("moco", "supcon"):
        with pytest.raises(ValueError, match=f"--gather-negatives ring is not for {model}"):
            config_of(model, gather_negatives="ring")
    if model == "supcon":
        return
    all_of_them = {} if model in ("cpc-v2", *TWO_VIEWS) else {"neg_samples": "all"}
    for word in ("none", "gather", "ring")[: 2 if model == "moco" else 3]:
        objectives = contrasts(task_of(model, gather_negatives=word, **all_of_them))
        assert objectives
        assert {objective.gather_negatives for objective in objectives} == {word}


def context_layers(model: str) -> None:
    """Each layer sees one row further up, none sees below its own."""
    for layers in (1, 3):
        task = task_of(model, context_layers=layers, **({"modules": 1} if model == "greedy-infomax" else {}))
        encodings = torch.randn(1, 16, 6, 6, requires_grad=True)
        network = task.model.context if isinstance(task.model.context, nn.Module) else None
        assert network is not None
        network = network[0] if isinstance(network, nn.ModuleList) else network
        network(encodings)[0, :, 4].sum().backward()
        rows = encodings.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
        assert rows == list(range(4 - layers, 5))


def pred_steps(model: str) -> None:
    for steps in (1, 3):
        task = task_of(model, pred_steps=steps)
        assert outputs_of(contrasts(task)[0], lambda t=task: step(t)).step_losses.shape == (1, steps)


def pred_directions(model: str) -> None:
    for directions in (1, 3):
        task = task_of(model, pred_directions=directions)
        (grids, *_) = inputs_of(contrasts(task)[0], lambda t=task: step(t))
        assert len(grids) == directions
        for turns, grid in enumerate(grids):
            assert torch.equal(torch.rot90(grid, turns, (2, 3)), grids[0])


def skip(model: str) -> None:
    """The contexts of the last rows predict nothing if the next row after skip lies outside of the grid of 5."""
    for rows in (0, 2):
        task = task_of(model, skip=rows, **({"modules": 1} if model == "greedy-infomax" else {}))
        found = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            inputs[1].retain_grad()
            found.append(inputs[1])

        contrasts(task)[0].register_forward_pre_hook(keep)
        step(task)["loss"].backward()
        used = found[0].grad.abs().sum((0, 1, 2, 4)).nonzero().flatten().tolist()
        assert used == list(range(5 - 1 - rows))


def neg_samples(model: str) -> None:
    """The bound on the mutual information is the logarithm of the keys minus the loss."""
    for number in (1, 9):
        values = step(
            task_of(model, neg_samples=number, modules=1)
            if model == "greedy-infomax"
            else task_of(model, neg_samples=number)
        )
        assert (values["mutual_information"] + values["loss"]).item() == pytest.approx(math.log(number + 1), abs=1e-5)
    options = {"neg_samples": "all"} | ({"modules": 1} if model == "greedy-infomax" else {})
    values = step(task_of(model, **options))
    # In a grid of 5 x 5 the first step has 3 rows of targets, the second 2, in each of 4 images.
    expected = (math.log(3 * 5 * 4) + math.log(2 * 5 * 4)) / 2
    assert (values["mutual_information"] + values["loss"]).item() == pytest.approx(expected, abs=1e-5)


def context_channels(model: str) -> None:
    for channels in (8, 12):
        (context,) = modules_of(task_of(model, context_channels=channels), ResidualContext)
        assert context.blocks[0].sideways.weight.shape[:2] == (channels, channels)


def shared_context(model: str) -> None:
    assert len(modules_of(task_of(model, pred_directions=3), ResidualContext)) == 3
    assert len(modules_of(task_of(model, pred_directions=3, shared_context=True), ResidualContext)) == 1


def target_channels(model: str) -> None:
    for channels in (8, 12):
        (objective,) = contrasts(task_of(model, target_channels=channels))
        targets = outputs_of(objective.target_projection, lambda o=objective: o(*torch.randn(2, 1, 2, 16, 5, 5)))
        assert targets.shape[1] == channels


def prediction_scale(model: str) -> None:
    """Logits are proportional to the scale; if they are nearly 0, all 4 x 25 keys are equally likely."""
    guess = math.log(4 * 25)
    near, far, farther = (step(task_of(model, prediction_scale=scale))["loss"].item() for scale in (1e-6, 1.0, 50.0))
    assert near == pytest.approx(guess, abs=1e-4)
    assert 0.001 < abs(far - guess) < abs(farther - guess)


def recipe(model: str) -> None:
    """In presets for runs of minutes, other options' defaults follow the recipe; elsewhere they are the paper's."""
    assert config_of(model, recipe="published").cpc.recipe == "published"

    def chosen(*options: str) -> tuple[Any, ...]:
        run = parse(["--model", model, *options]).run
        return run.cpc.recipe, run.cpc.norm, run.cpc.prediction_scale, run.view.gray, run.view.patch_norm

    assert chosen() == chosen("--recipe", "short") == ("short", "batch", 1.0, True, True)
    assert chosen("--recipe", "published") == ("published", "layer", 0.1, False, False)
    assert chosen("--dataset", "folder") == ("short", *chosen("--dataset", "folder", "--recipe", "published")[1:])
    small = ["--dataset", "folder", "--image-size", "32"]
    assert chosen(*small) == ("short", "batch", 1.0, False, False)
    assert chosen(*small, "--recipe", "published") == ("published", "layer", 0.1, False, False)


def variant(model: str) -> None:
    options = {"pred_steps": 3}
    (paper,) = contrasts(task_of(model, **options))
    task = task_of(model, variant="lightning-bolts", **options)
    (objective,) = contrasts(task)
    assert (paper.reduction, paper.pred_steps) == ("mean", 3)
    assert (objective.reduction, objective.pred_steps) == ("lightning-bolts", None)
    assert {context.padding for context in modules_of(task, ResidualContext)} == {"lightning-bolts"}
    with pytest.raises(Exception, match="it needs --pred-directions 1 --pred-steps 3"):
        config_of(model, variant="lightning-bolts", pred_steps=2)


# Greedy InfoMax.


def modules(model: str) -> None:
    for number in (1, 2, 3):
        task = task_of(model, modules=number)
        assert len(task.parts()) == number
        # One module is CPC, with a context network.
        assert len(modules_of(task, GatedPixelCNNContext)) == (number == 1)


def split_at(model: str) -> None:
    task = task_of(model, encoder=ENCODER.replace("1-1-1", "1-2-1"), split_at=(2,))
    assert [len(module.blocks) for module in task.model.encoder_modules] == [2, 2]
    assert len(task.parts()) == 2


def objective(model: str) -> None:
    images, labels = torch.from_numpy(noise()), torch.tensor([0, 1, 0, 1])
    for kind, number in (("infonce", 0), ("supervised", 2)):
        task = task_of(model, objective=kind)
        losses = [task.losses(images, each, RandomStreams(0, CPU))["loss"].item() for each in (labels, 1 - labels)]
        assert (losses[0] != losses[1]) == bool(number)
        assert isinstance(task.model, GreedySupervised if number else GreedyInfoMax)
    supervised = config_of(model, objective="supervised")
    with pytest.raises(ValueError, match="--objective supervised: the images of textures have no labels"):
        task_class(model)(supervised, dataset_of(noise(), labels=None), CPU)


def init(model: str) -> None:
    """Delta-orthogonal kernels are zero except in the middle."""
    for name, sides in (("he", True), ("delta-orthogonal", False)):
        kernels = [m.weight for m in task_of(model, init=name).model.encoder.modules() if isinstance(m, nn.Conv2d)]
        assert any(bool(kernel[..., 0, 0].any()) for kernel in kernels if kernel.shape[-1] == 3) == sides


def train_module(model: str) -> None:
    task = task_of(model, train_module=1, resume_from="run")
    task.model.train()
    assert [next(module.parameters()).requires_grad for module in task.model.encoder_modules] == [False, True, True]
    assert [module.training for module in task.model.encoder_modules] == [False, True, True]
    (part,) = task.parts()
    trained = {id(parameter) for parameter in part.parameters()}
    assert {id(parameter) for parameter in task.model.encoder_modules[1].parameters()} <= trained
    assert not {id(parameter) for parameter in task.model.encoder_modules[2].parameters()} & trained
    with pytest.raises(Exception, match="--train-module 1 needs --resume-from"):
        config_of(model, train_module=1)


def cache_outputs(model: str, tmp_path: Path) -> None:
    """A second pass over the images gives the first one's features: the crops are fixed and the files are read."""
    task = task_of(model, columns(8), train_module=1, resume_from="run", cache_outputs=tmp_path, flip=True)
    task.prepare(Ranks(CPU), resumed=False)
    assert list(tmp_path.iterdir())
    streams = RandomStreams(0, CPU)
    fetch = task.fetcher(CPU, streams)
    first, second = (task.inputs(fetch(np.arange(8)), streams) for _ in range(2))
    assert first.shape[:2] == (8 * 25, 8)
    assert torch.equal(first, second)
    uncached = task_of(model, columns(8), train_module=1, resume_from="run", flip=True)
    fetch = uncached.fetcher(CPU, streams)
    assert not torch.equal(*(uncached.inputs(fetch(np.arange(8)), streams) for _ in range(2)))


def cache_views(model: str, tmp_path: Path) -> None:
    sizes = []
    for views in (1, 3):
        folder = tmp_path / str(views)
        folder.mkdir()
        task = task_of(model, columns(8), train_module=1, resume_from="run", cache_outputs=folder, cache_views=views)
        task.prepare(Ranks(CPU), resumed=False)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[1] > 2.5 * sizes[0]


def pipeline(model: str) -> None:
    assert not config_of(model).pipeline
    assert config_of(model, pipeline=True).pipeline
    # Each process has the whole batch, so there is nothing to gather.
    assert {each.gather_negatives for each in contrasts(task_of(model, pipeline=True))} == {"none"}
    with joined_ranks("cpu") as ranks, pytest.raises(TrainingError, match="needs a process for each of 3 modules"):
        Trainer(
            task_of(model, pipeline=True),
            config_of(model, pipeline=True),
            RunDir(Path("run")),
            Ranks(ranks.device, pipeline=True),
        )


# Two views: SimCLR, MoCo, supervised contrast.


def view_size(model: str) -> None:
    for side in (24, 32):
        assert seen(task_of(model, view_size=side)).shape[-2:] == (side, side)


def center_scale(model: str) -> None:
    """The option changes the size of whole images from which features are taken, and leaves views unchanged."""
    for scale, side in ((1.0, 24), (1.5, 36)):
        task = task_of(model, view_size=24, center_scale=scale)
        assert seen(task).shape[-2:] == (24, 24)
        images = torch.from_numpy(task.examples.images)
        (whole,) = inputs_of(first_conv(task), lambda t=task, i=images: t.features(t.model, i))
        assert whole.shape[-2:] == (side, side)


def min_crop_area(model: str) -> None:
    """Checked on views without colour changes, as in fine-tuning, of images whose values show the column."""
    widths = []
    for area in (0.08, 0.99):
        task = task_of(model, columns(32), min_crop_area=area)
        images, generator = torch.from_numpy(task.examples.images), torch.Generator().manual_seed(0)
        (views,) = inputs_of(first_conv(task), lambda t=task, i=images, g=generator: t.encode(t.model, i, g))
        values = column_of(views).flatten(1)
        widths.append((values.amax(1) - values.amin(1)).mean().item())
    assert widths[0] < 24 < 28 < widths[1]


def blur_kernel(model: str) -> None:
    images = noise(32)
    rough, smooth = (
        seen(task_of(model, images, blur_kernel=taps, min_crop_area=1.0)).diff(dim=3).abs().mean().item()
        for taps in (0, 9)
    )
    assert smooth < 0.8 * rough


def projection_channels(model: str) -> None:
    for channels in (8, 12):
        task = task_of(model, projection_channels=channels)
        compared = outputs_of(task.model.head, lambda t=task: step(t))
        assert compared.shape == (4 if model == "moco" else 8, channels)
        assert task.model.head[0].out_features == 4 * channels


def temperature(model: str) -> None:
    for divisor in (0.07, 1.0):
        task = task_of(model, temperature=divisor)
        losses = []
        projections = outputs_of(task.model.head, lambda t=task, losses=losses: losses.append(step(t)["loss"]))
        views = F.normalize(projections, dim=1)
        if model == "moco":
            # The keys have replaced the oldest of the queue, which a new task of the same seed has.
            keys = task.model.objective.queue.keys[:4]
            queue = task_of(model, temperature=divisor).model.objective.queue.keys[:16]
            logits = torch.cat([(views * keys).sum(1, keepdim=True), views @ queue.T], 1) / divisor
            expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
        elif model == "simclr":
            logits = (views @ views.T / divisor).fill_diagonal_(-torch.inf)
            expected = F.cross_entropy(logits, (torch.arange(8) + 4) % 8)
        else:
            # Images are of two classes in turn.
            logits = (views @ views.T / divisor).fill_diagonal_(-torch.inf).log_softmax(1)
            same = (torch.arange(8)[:, None] - torch.arange(8)) % 2 == 0
            expected = -logits.masked_fill(~same, 0).fill_diagonal_(0).sum(1).mean() / 3
        torch.testing.assert_close(losses[0], expected, atol=1e-4, rtol=1e-4)


def pixels(model: str, images: np.ndarray, **options: Any) -> Tensor:
    """Views of a step in 0..1."""
    return seen(task_of(model, images, min_crop_area=1.0, **options)) * 0.2 + 0.5


def jitter_strength(model: str) -> None:
    """The strength determines how far brightness alone spreads the values of a colour of mean 100/255."""
    images = np.broadcast_to(np.array([60, 100, 140], np.uint8)[:, None, None], (64, 3, 32, 32)).copy()
    given = {"jitter_probability": 1.0, "gray_probability": 0.0}
    spreads = [
        pixels(model, images, jitter_strength=strength, **given).mean((1, 2, 3)).std().item()
        for strength in (0.0, 0.25, 1.0)
    ]
    assert spreads[0] < 1e-4 < 2 * spreads[0] + 0.02 < spreads[1] < 0.6 * spreads[2]
    view = config_of(model, jitter_strength=0.5).encoder_section.view
    assert view["jitter"] == pytest.approx((0.4, 0.4, 0.4, 0.1))


def share_of(changed: Tensor) -> float:
    return changed.float().mean().item()


def jitter_probability(model: str) -> None:
    images = np.full((64, 3, 32, 32), 100, np.uint8)
    for probability in (0.0, 0.5, 1.0):
        views = pixels(model, images, jitter_probability=probability, gray_probability=0.0)
        changed = (views - 100 / 255).abs().flatten(1).amax(1) > 1e-3
        assert share_of(changed) == pytest.approx(probability, abs=0.2)


def gray_probability(model: str) -> None:
    images = np.broadcast_to(np.array([60, 100, 140], np.uint8)[:, None, None], (64, 3, 32, 32)).copy()
    for probability in (0.0, 0.5, 1.0):
        views = pixels(model, images, gray_probability=probability, jitter_probability=0.0)
        assert share_of(views.std(1).flatten(1).amax(1) < 1e-4) == pytest.approx(probability, abs=0.2)


def blur_probability(model: str) -> None:
    given = {"jitter_probability": 0.0, "gray_probability": 0.0, "blur_kernel": 9}
    for probability in (0.25, 1.0):
        views = pixels(model, noise(64), blur_probability=probability, **given)
        # A deviation of few tenths of a pixel changes next to nothing.
        smooth = views.diff(dim=3).abs().mean((1, 2, 3)) < 0.22
        assert share_of(smooth) == pytest.approx(0.8 * probability, abs=0.2)


def linear_layers(task: Task) -> list[nn.Linear]:
    return [module for module in task.model.head if isinstance(module, nn.Linear)]


def head_layers(model: str) -> None:
    for number in (1, 3):
        task = task_of(model, head_layers=number)
        widths = [task.model.encoder.out_channels, *[32] * (number - 1), 8]
        layers = linear_layers(task)
        assert [layer.weight.shape for layer in layers] == list(map(torch.Size, zip(widths[1:], widths, strict=False)))
        assert len(modules_of(task, nn.ReLU)) >= number - 1
        assert not isinstance(task.model.head[-1], nn.ReLU)


def head_channels(model: str) -> None:
    for width in (12, None):
        layers = linear_layers(task_of(model, head_channels=width))
        assert [layer.out_features for layer in layers] == [width or 32, 8]


def head_norm(model: str) -> None:
    for on in (False, True):
        task = task_of(model, head_norm=on)
        assert all((layer.bias is None) == on for layer in linear_layers(task))
        projections = outputs_of(task.model.head, lambda t=task: step(t))
        assert bool((projections.mean(0).abs() < 1e-4).all()) == on


def queue_size(model: str) -> None:
    for size in (16, 24):
        assert task_of(model, queue_size=size).model.objective.queue.size == size


def key_momentum(model: str) -> None:
    for share in (0.0, 0.75):
        task = task_of(model, key_momentum=share)
        leader, follower = next(task.model.encoder.parameters()), next(task.model.key_encoder.parameters())
        start = leader.detach().clone()
        assert torch.equal(follower, start)
        with torch.no_grad():
            leader += 1
        task.updated()
        torch.testing.assert_close(follower, start + 1 - share)


# PixelCNN.


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def pixel_model(model: str, layers: int, channels: int, **more: Any) -> nn.Module:
    if model == "pixelcnn":
        return PixelCNN(3, layers=layers, hidden_channels=channels)
    if model == "gated-pixelcnn":
        return GatedPixelCNN(3, layers=layers, channels=channels, num_classes=None)
    return PixelCNNPP(3, blocks=layers, channels=channels, **{"mixtures": 2, **more})


def layers(model: str) -> None:
    for number in (1, 2):
        assert numbers(task_of(model, layers=number).model) == numbers(pixel_model(model, number, 6))
    assert numbers(pixel_model(model, 1, 6)) != numbers(pixel_model(model, 2, 6))


def hidden_channels(model: str) -> None:
    for channels in (6, 12):
        assert numbers(task_of(model, hidden_channels=channels).model) == numbers(pixel_model(model, 1, channels))
    if model == "pixelcnn++":
        assert task_of(model, hidden_channels=8)
    else:
        with pytest.raises(ValueError, match="--hidden-channels 8 is not a multiple of the images' 3 colours"):
            task_of(model, hidden_channels=8)


def class_conditional(model: str) -> None:
    if model == "pixelcnn":
        with pytest.raises(Exception, match="--class-conditional needs --model gated-pixelcnn or pixelcnn"):
            config_of(model, class_conditional=True)
        return
    images, labels = torch.from_numpy(noise()), torch.tensor([0, 1, 0, 1])
    for on in (False, True):
        task = task_of(model, class_conditional=on, **({"dropout": 0.0} if model == "pixelcnn++" else {}))
        with torch.no_grad():
            for name, parameter in task.model.named_parameters():
                if "class" in name:
                    parameter.normal_()
        task.model.eval()
        bits = [
            task.losses(images, each, RandomStreams(0, CPU))["bits_per_dim"].item() for each in (labels, 1 - labels)
        ]
        assert (bits[0] != bits[1]) == on
        assert task.description()["classes"] == (["0", "1"] if on else [])


def mirror(model: str) -> None:
    images = columns(16, 8)
    for on in (False, True):
        task = task_of(model, images, mirror=on)
        given = []
        task.model.bits_per_dim = lambda batch, labels, given=given: given.append(batch) or torch.zeros(())
        step(task)
        flipped = [bool(torch.equal(image, torch.from_numpy(images[0]).flip(2))) for image in given[0]]
        assert 3 <= sum(flipped) <= 13 if on else not any(flipped)
        kept = [bool(torch.equal(image, torch.from_numpy(images[0]))) for image in given[0]]
        assert all(one != other for one, other in zip(flipped, kept, strict=True))


def sample_every(model: str) -> None:
    for updates in (2, 500):
        assert task_of(model, sample_every=updates).observe_every == updates


def probe_every(model: str) -> None:
    for updates in (None, 3):
        task = task_of(model, probe_every=updates)
        task.prepare(Ranks(CPU), resumed=False)
        assert (task.observe_every, task.observe_start) == (updates, updates is not None)
        assert list(task.observe(0, RunDir(Path()))) == ([] if updates is None else ["knn_accuracy", "effective_rank"])


def probe_images(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, classes: int) -> ProbeResult:
        seen.append((len(train), len(train_labels), len(test), len(test_labels)))
        return ProbeResult(0.5, 1.0)

    monkeypatch.setattr(encoder_task, "linear_probe", probe)
    for most, count in ((3, 3), (100, 8), (None, 8)):
        task_of(model, noise(8), probe_images=most).evaluate()
        assert seen == [(count, count, 8, 8)] * 2
        seen.clear()


def ema_decay(model: str) -> None:
    """Update 1 keeps (1 + 1) / (10 + 1) of the average, or the decay if that is less."""
    for decay, kept in ((0.0, None), (0.1, 0.1), (0.9, 2 / 11)):
        task = task_of(model, noise(2, 8), ema_decay=decay)
        name, before = next((n, p.detach().clone()) for n, p in task.model.named_parameters())
        with torch.no_grad():
            dict(task.model.named_parameters())[name].add_(1.0)
        task.updated()
        state = task.state_dict()
        if kept is None:
            assert state == {}
        else:
            averaged = [value for key, value in state.items() if key.endswith(name)]
            assert len(averaged) == 1
            torch.testing.assert_close(averaged[0], before + 1 - kept)


def levels(model: str) -> None:
    """The number of values that a pixel may have."""
    codes = noise(4, 8) % 5
    for number in (None, 5, 200):
        task = task_of(model, codes, levels=number)
        assert task.model.levels == (number or 256)
        assert task.model.noise_shape((1, 3, 2, 2))[-1] == (number or 256)
    with pytest.raises(ValueError, match="--levels 4: textures holds values up to 4"):
        task_of(model, codes, levels=4)


def code_channels(model: str) -> None:
    """The number of learned features of each code."""
    for number in (0, 7):
        table = task_of(model, noise(4, 8) % 5, levels=5, code_channels=number).model.codes
        assert (table is None) if number == 0 else table.weight.shape == (5, 7)


def mixtures(model: str) -> None:
    for number in (1, 4):
        expected = numbers(pixel_model(model, 1, 6, mixtures=number))
        assert numbers(task_of(model, mixtures=number).model) == expected


def dropout(model: str) -> None:
    images = noise(2, 8)
    for probability in (0.0, 0.5):
        task = task_of(model, images, dropout=probability)
        losses = {step(task)["loss"].item() for _ in range(1)} | {step(task, seed=1)["loss"].item()}
        assert len(losses) == (1 if probability == 0 else 2)
        task.model.eval()
        with torch.no_grad():
            assert torch.equal(*(task.model.bits_per_dim(torch.from_numpy(images)) for _ in range(2)))


def data_init(model: str) -> None:
    """Initialization from data does not change the random draws of other weights."""
    plain, fitted = (dict(task_of(model, noise(4, 8), data_init=on).model.named_parameters()) for on in (False, True))
    changed = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    assert changed
    assert changed != set(plain)


# The loop, on a model of one weight whose gradient is 1, so that an update of Adam is the learning rate.


class OneWeight(Task):
    """Task with loss = weight · factor, which records properties of the steps."""

    def __init__(self, config: RunConfig, *, images: int = 8, factor: float = 1.0) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, 100.0)
        self.examples = ImageSet(np.arange(images, dtype=np.uint8)[:, None, None, None])
        self.weights: list[float] = []
        self.batches: list[list[int]] = []
        self.autocast: list[tuple[bool, torch.dtype]] = []
        self.compiled = False
        self.look: Callable[[], object] = lambda: None
        self._factor = factor

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        self.weights.append(self.model.weight.item())
        self.batches.append(images.flatten().tolist())
        self.autocast.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        self.look()
        loss = self.model.weight.float().sum() * self._factor
        return {"loss": loss, "images": images.float().mean()}

    def compile(self) -> None:
        self.compiled = True

    def evaluate(self) -> dict[str, float]:
        return {}

    def save(self, run: RunDir) -> None: ...


def trained(folder: Path, *, images: int = 8, factor: float = 1.0, look: Any = None, **options: Any) -> OneWeight:
    """Train in this folder, and return the task."""
    config = config_of("cpc-v1", **options)
    task = OneWeight(config, images=images, factor=factor)
    folder.mkdir(exist_ok=True)
    run = RunDir(folder)
    if look is not None:
        task.look = lambda: look(run)
    log = RunLog(run, loggers=config.output.logger)
    Trainer(task, config, run, Ranks(CPU)).train(log, StopRequest())
    log.close()
    task.weights.append(task.model.weight.item())
    return task


def rates(task: OneWeight) -> list[float]:
    """Return by how much each update lowered the weight."""
    return [before - after for before, after in zip(task.weights, task.weights[1:], strict=False)]


def steps(model: str, tmp_path: Path) -> None:
    for number in (1, 3):
        assert len(trained(tmp_path / str(number), steps=number).batches) == number


def epochs(model: str, tmp_path: Path) -> None:
    """8 images in batches of 4."""
    for number in (1, 3):
        task = trained(tmp_path / str(number), steps=None, epochs=number)
        assert sorted(image for batch in task.batches for image in batch) == sorted(number * list(range(8)))


def time_budget(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "seconds_per_step", lambda take, budget: 0.5)
    for minutes, number in ((0.01, 1), (0.03, 3)):
        summary = summary_of(tmp_path / str(number), monkeypatch, steps=None, time_budget=minutes, evaluate=False)
        assert summary["steps"] == number


def evaluate(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for on in (False, True):
        summary = summary_of(tmp_path / str(on), monkeypatch, steps=1, evaluate=on)
        assert ("probe_accuracy" in summary) == on


def summary_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Return the summary of a whole run of CPC on a few images."""
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **more: dataset_of(noise(8)))
    assert program.run(Command(run=config_of("cpc-v1", **options), out_dir=folder))[0] == 0
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def batch_size(model: str, tmp_path: Path) -> None:
    for number in (2, 8):
        assert {len(batch) for batch in trained(tmp_path / str(number), batch_size=number).batches} == {number}


def lr(model: str, tmp_path: Path) -> None:
    for rate in (0.25, 1.0):
        assert rates(trained(tmp_path / str(rate), lr=rate)) == pytest.approx([rate] * 4, rel=1e-3)


def optimizer(model: str, tmp_path: Path) -> None:
    """With a gradient of 8, Adam's step is the rate, SGD's the rate times 8, and that of LARS a share of the weight."""
    given = {"factor": 8.0, "lr": 0.5, "momentum": 0.0}
    assert rates(trained(tmp_path / "adam", optimizer="adam", **given)) == pytest.approx([0.5] * 4, rel=1e-3)
    assert rates(trained(tmp_path / "sgd", optimizer="sgd", **given)) == pytest.approx([4.0] * 4, rel=1e-3)
    lars = trained(tmp_path / "lars", optimizer="lars", weight_decay=0.02, **given)
    # 0.001 |w| / (|g| + β |w|) · (g + β w), times the rate.
    assert lars.weights == pytest.approx([100 * (1 - 0.0005) ** done for done in range(5)], rel=1e-6)


def momentum(model: str, tmp_path: Path) -> None:
    for share in (0.0, 0.5):
        found = rates(trained(tmp_path / str(share), optimizer="sgd", lr=1.0, momentum=share))
        assert found == pytest.approx([sum(share**age for age in range(done)) for done in range(1, 5)], rel=1e-3)


def schedule(model: str, tmp_path: Path) -> None:
    constant, cosine = (rates(trained(tmp_path / name, lr=1.0, schedule=name)) for name in ("constant", "cosine"))
    assert constant == pytest.approx([1.0] * 4, rel=1e-3)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)], rel=1e-3)


def final_lr(model: str, tmp_path: Path) -> None:
    found = rates(trained(tmp_path / "cosine", lr=1.0, schedule="cosine", final_lr=0.5))
    assert found == pytest.approx([0.75 + 0.25 * math.cos(math.pi * done / 4) for done in range(4)], rel=1e-3)
    assert rates(trained(tmp_path / "constant", lr=1.0, final_lr=0.5)) == pytest.approx([1.0] * 4, rel=1e-3)


def warmup_steps(model: str, tmp_path: Path) -> None:
    assert rates(trained(tmp_path, lr=1.0, warmup_steps=3)) == pytest.approx([1 / 3, 2 / 3, 1, 1], rel=1e-3)


def clip_grad(model: str, tmp_path: Path) -> None:
    """The logged norm is that before clipping; test_learner.py checks gradients of several parameters."""
    for precision in ("fp32", "fp16"):
        for limit, kept in ((None, 8.0), (0.5, 0.5), (9.0, 8.0)):
            folder = tmp_path / f"{precision}-{limit}"
            task = trained(folder, factor=8.0, clip_grad=limit, precision=precision, log_every=1)
            assert task.model.weight.grad.item() == pytest.approx(kept, rel=1e-4)
            assert [record["grad_norm"] for record in read_metrics(folder / "metrics.jsonl")] == [8.0] * 4


def weight_decay(model: str, tmp_path: Path) -> None:
    """Without a gradient AdamW shrinks a weight by the share lr · decay of itself, where Adam's L2 would take lr."""
    task = trained(tmp_path / "decay", factor=0.0, lr=0.5, weight_decay=0.01)
    assert task.weights == pytest.approx([100 * (1 - 0.5 * 0.01) ** done for done in range(5)], rel=1e-5)
    assert trained(tmp_path / "none", factor=0.0, lr=0.5).weights == [100.0] * 5


def resume_from(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny learning rate, a run ends with the weights that it starts from."""
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset_of(noise()))
    monkeypatch.setattr(task_class(model), "evaluate", lambda task: {})
    monkeypatch.setattr(task_class(model), "save", lambda task, run: None)
    config = tmp_path / "config.yaml"
    config.write_text(config_of(model, lr=1e-12, steps=1).to_yaml())
    ends = {}
    for name, options in (
        ("first", ["--config", config, "--seed", "1"]),
        ("started", ["--resume-from", tmp_path / "first", "--seed", "2"]),
        ("plain", ["--config", config, "--seed", "2"]),
    ):
        assert program.main([*map(str, options), "--out-dir", str(tmp_path / name)]) == 0
        ends[name] = load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]["encoder.conv1.weight"]
    torch.testing.assert_close(ends["started"], ends["first"], atol=1e-6, rtol=0)
    assert (ends["plain"] - ends["first"]).abs().max() > 0.01


def device(model: str) -> None:
    for name in ("cpu", "meta"):
        with joined_ranks(config_of("cpc-v1", device=name).compute.device) as ranks:
            assert ranks.device == torch.device(name)
    with pytest.raises(Exception, match="--device: expected a name like cpu"):
        config_of("cpc-v1", device="gpu")


def precision(model: str, tmp_path: Path) -> None:
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        task = trained(tmp_path / name, precision=name, steps=1)
        enabled, used = task.autocast[0]
        assert enabled == (name != "fp32")
        assert used == kind or not enabled
        assert task.model.weight.dtype == torch.float32
        state = load_checkpoint(tmp_path / name / "checkpoint.pt")
        assert bool(state["scaler"]) == (name == "fp16")
        for each in WITH_ENCODER:
            real = task_of(each, precision=name)
            with torch.autocast("cpu", kind, enabled=name != "fp32"):
                assert seen(real).dtype == kind


def channels_last(model: str) -> None:
    for each in WITH_ENCODER:
        for on in (False, True):
            task = task_of(each, channels_last=on, **({} if each in TWO_VIEWS else {"gray": False}))
            inside = first_conv(task)
            assert seen(task).is_contiguous(memory_format=torch.channels_last) == on
            assert inside.weight.is_contiguous(memory_format=torch.channels_last) == on


def compile(model: str, tmp_path: Path) -> None:
    assert not trained(tmp_path / "plain").compiled
    assert trained(tmp_path / "compiled", compile=True).compiled


def seed(model: str, tmp_path: Path) -> None:
    """Weights, order, crops and negatives."""
    for each in MODELS:
        first, again, other = (next(task_of(each, seed=number).model.parameters()) for number in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    first, again, other = (trained(tmp_path / str(n), seed=number).batches for n, number in enumerate((1, 1, 2)))
    assert first == again != other
    task = task_of("cpc-v1", neg_samples=3)
    assert not torch.equal(seen(task, seed=1), seen(task, seed=2))
    assert torch.equal(seen(task, seed=1), seen(task, seed=1))


def log_every(model: str, tmp_path: Path) -> None:
    task = trained(tmp_path, steps=5, log_every=2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5]
    means = [float(np.mean(batch)) for batch in task.batches]
    expected = [(means[0] + means[1]) / 2, (means[2] + means[3]) / 2, means[4]]
    assert [record["images"] for record in records] == pytest.approx(expected)


def checkpoint_every(model: str, tmp_path: Path) -> None:
    """Checked by the step of the checkpoint that exists when a step begins."""
    found = []
    trained(
        tmp_path, steps=5, checkpoint_every=2, look=lambda run: found.append(load_checkpoint(run.checkpoint)["step"])
    )
    assert found == [0, 0, 2, 2, 4]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def logger(model: str, tmp_path: Path) -> None:
    for number, names in enumerate(((), ("tensorboard",))):
        trained(tmp_path / str(number), logger=names)
        assert (tmp_path / str(number) / "tensorboard").is_dir() == bool(names)


# The images.


def loaded(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Return the arguments with which a data set is loaded."""
    asked: dict[str, Any] = {}

    def load_dataset(name: str, data_dir: Path | None = None, **more: Any) -> None:
        asked.update(name=name, data_dir=data_dir, **more)

    monkeypatch.setattr(run_data, "load_dataset", load_dataset)
    run_data.load_data(config_of("cpc-v1", **options))
    return asked


def dataset(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for name in DATASETS if medium(name) == "images"):
        assert loaded(monkeypatch, dataset=name)["name"] == name


def data_dir(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert loaded(patch, dataset="folder", data_dir=tmp_path)["data_dir"] == tmp_path
    for folder in ("cats", "dogs"):
        for number in range(3):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = Image.fromarray(noise(1, 40)[0].transpose(1, 2, 0))
            image.save(tmp_path / folder / f"{number}.png")
    data = run_data.load_data(config_of("cpc-v1", dataset="folder", data_dir=tmp_path, image_size=32))
    assert data.classes == ("cats", "dogs")
    assert data.image_shape == (3, 32, 32)


def download(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for on in (False, True):
        assert loaded(monkeypatch, dataset="stl10", download=on)["download"] == on


def image_size(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (None, 48):
        assert loaded(monkeypatch, image_size=side)["image_size"] == side


def utterances(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (None, 20):
        assert loaded(monkeypatch, utterances=count)["utterances"] == count


EFFECTS: dict[str, Callable[..., None]] = {
    check.__name__: check
    for check in (
        *(dataset, data_dir, download, image_size, utterances),
        *(crop, pad, grid_size, patch_size, flip, gray, patch_norm, patch_augmentation),
        *(encoder, norm, gather_negatives, context_layers, pred_steps, pred_directions, skip, neg_samples),
        *(context_channels, shared_context, target_channels, prediction_scale, variant, recipe),
        *(modules, split_at, objective, init, train_module, cache_outputs, cache_views, pipeline),
        *(probe_every, probe_images),
        *(view_size, center_scale, min_crop_area, blur_kernel, projection_channels, temperature),
        *(levels, code_channels),
        *(jitter_strength, jitter_probability, gray_probability, blur_probability),
        *(head_layers, head_channels, head_norm, queue_size, key_momentum, optimizer, momentum),
        *(layers, hidden_channels, class_conditional, mirror, sample_every, ema_decay, mixtures, dropout, data_init),
        *(
            resume_from,
            epochs,
            steps,
            time_budget,
            batch_size,
            lr,
            schedule,
            final_lr,
            warmup_steps,
            clip_grad,
            weight_decay,
        ),
        *(device, precision, channels_last, compile, seed, log_every, checkpoint_every, evaluate, logger),
    )
}
# Options of the shared sections are the loop's and the data's, and looked at once.
OPTIONS = [
    (model, name)
    for model in MODELS
    for name, section in sections_of(model).items()
    if section not in SHARED or model == "cpc-v1"
]


@pytest.mark.parametrize(("model", "name"), OPTIONS)
def test_option_has_its_effect(model, name, tmp_path, monkeypatch):
    assert name in EFFECTS, f"{option(name)} needs a test here that fails when it does nothing"
    look(EFFECTS[name], model, tmp_path=tmp_path, monkeypatch=monkeypatch)


def look(check: Callable[..., None], model: str, **fixtures: object) -> None:
    check(model, **{name: fixture for name, fixture in fixtures.items() if name in check.__annotations__})


@pytest.mark.parametrize(
    ("model", "name"), [each for each in OPTIONS if each[1] not in ("resume_from", "epochs", "time_budget")]
)
def test_an_option_that_does_nothing_is_noticed(model, name, tmp_path, monkeypatch):
    """The test above fails, and does not break, where the option never reaches the config.

    The test of --resume-from runs the program; without a length there is no config.
    """
    given = config_of

    def ignored(model: str, **options: Any) -> RunConfig:
        return given(model, **{each: value for each, value in options.items() if each != name})

    monkeypatch.setitem(globals(), "config_of", ignored)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        look(EFFECTS[name], model, tmp_path=tmp_path, monkeypatch=monkeypatch)


def test_no_entry_is_left_over():
    assert set(EFFECTS) == {name for model in MODELS for name in sections_of(model)}


KINDS = {
    "cpc-v1": (CPC, GridInfoNCE),
    "cpc-v2": (CPC, TargetInfoNCE),
    "greedy-infomax": (GreedyInfoMax, GridInfoNCE),
    "simclr": (SimCLR, NTXentLoss),
    "moco": (MoCo, MoCoLoss),
    "supcon": (SupCon, SupConLoss),
    "pixelcnn": (PixelCNN, None),
    "gated-pixelcnn": (GatedPixelCNN, None),
    "pixelcnn++": (PixelCNNPP, None),
}


@pytest.mark.parametrize("model", MODELS)
def test_model_is_the_one_named(model):
    kind, contrast = KINDS[model]
    task = task_of(model)
    assert type(task.model) is kind
    assert {type(module) for module in contrasts(task)} == ({contrast} if contrast else set())


# Other values than the defaults, for the command line; several cannot be given together.
GIVEN: dict[str, tuple[str, Any]] = {
    "dataset": ("folder", "folder"),
    "data_dir": ("there", Path("there")),
    "image_size": ("77", 77),
    "utterances": ("20", 20),
    "crop": ("70", 70),
    "pad": ("3", 3),
    "grid_size": ("9", 9),
    "patch_size": ("14", 14),
    "encoder": ("wrn-10-1", "wrn-10-1"),
    "norm": ("instance", "instance"),
    "gather_negatives": ("none", "none"),
    "context_layers": ("7", 7),
    "pred_steps": ("2", 2),
    "pred_directions": ("3", 3),
    "skip": ("0", 0),
    "neg_samples": ("11", 11),
    "context_channels": ("19", 19),
    "target_channels": ("21", 21),
    "prediction_scale": ("0.3", 0.3),
    "recipe": ("published", "published"),
    "modules": ("2", 2),
    "objective": ("supervised", "supervised"),
    "init": ("delta-orthogonal", "delta-orthogonal"),
    "cache_views": ("5", 5),
    "view_size": ("57", 57),
    "center_scale": ("1.7", 1.7),
    "min_crop_area": ("0.4", 0.4),
    "blur_kernel": ("3", 3),
    "projection_channels": ("33", 33),
    "temperature": ("0.9", 0.9),
    "levels": ("17", 17),
    "code_channels": ("8", 8),
    "jitter_strength": ("0.7", 0.7),
    "jitter_probability": ("0.6", 0.6),
    "gray_probability": ("0.3", 0.3),
    "blur_probability": ("0.4", 0.4),
    "head_layers": ("4", 4),
    "head_channels": ("21", 21),
    "queue_size": ("321", 321),
    "key_momentum": ("0.5", 0.5),
    "optimizer": ("lars", "lars"),
    "momentum": ("0.8", 0.8),
    "layers": ("6", 6),
    "hidden_channels": ("18", 18),
    "sample_every": ("123", 123),
    "probe_every": ("234", 234),
    "probe_images": ("77", 77),
    "ema_decay": ("0.7", 0.7),
    "mixtures": ("3", 3),
    "dropout": ("0.3", 0.3),
    "steps": ("31", 31),
    "batch_size": ("6", 6),
    "lr": ("0.003", 0.003),
    "schedule": ("constant", "constant"),
    "final_lr": ("0.1", 0.1),
    "warmup_steps": ("17", 17),
    "clip_grad": ("2.5", 2.5),
    "weight_decay": ("0.02", 0.02),
    "device": ("meta", "meta"),
    "precision": ("fp16", "fp16"),
    "seed": ("5", 5),
    "log_every": ("9", 9),
    "checkpoint_every": ("45", 45),
    "logger": ("mlflow", ("mlflow",)),
}
# Refused without others, or by others above: their effects are tested above, their refusals in test_greedy_run.py.
ALONE = {
    "variant": ["--pred-directions", "1", "--pred-steps", "4", "--grid-size", "6", "--crop", "56"],
    "split_at": ["--split-at", "1", "2"],
    "train_module": ["--train-module", "0"],
    "epochs": ["--epochs", "2"],
    "time_budget": ["--time-budget", "0.5"],
}
ELSEWHERE = {"resume_from", "cache_outputs", "pipeline"}


@pytest.mark.parametrize("model", MODELS)
def test_command_line_fills_every_option(model, monkeypatch):
    # Some decide nothing beside others, and are refused then: test_idle_options.py.
    monkeypatch.setattr("cpc_ext.programs.train_options._refuse_idle_options", lambda *arguments: None)
    sections = sections_of(model)
    defaults = parse(["--model", model, "--dataset", "folder"]).run
    arguments, expected = ["--model", model], {}
    for name, section in sections.items():
        before = getattr(getattr(defaults, section), name)
        if isinstance(before, bool):
            if (name, model) not in {("class_conditional", "pixelcnn"), ("pipeline", model), ("shared_context", "")}:
                arguments.append(option(f"no_{name}" if before else name))
                expected[name] = not before
        elif name in GIVEN:
            text, expected[name] = GIVEN[name]
            arguments += [option(name), text]
        else:
            assert name in ALONE or name in ELSEWHERE, f"{option(name)} needs a value in GIVEN"
    run = parse(arguments).run
    assert {name: getattr(getattr(run, sections[name]), name) for name in expected} == expected


def test_options_that_are_given_alone():
    bolts = parse(["--model", "cpc-v2", "--variant", "lightning-bolts", *ALONE["variant"]]).run
    assert bolts.cpc.variant == "lightning-bolts"
    assert parse(["--model", "greedy-infomax", *ALONE["split_at"]]).run.greedy.split_at == (1, 2)
    assert parse(["--model", "greedy-infomax", *ALONE["train_module"]]).run.greedy.train_module == 0
    assert parse(["--model", "greedy-infomax", "--pipeline"]).run.greedy.pipeline
    assert parse(ALONE["epochs"]).run.optimization.epochs == 2
    assert parse(ALONE["epochs"]).run.optimization.steps is None
    assert parse(ALONE["time_budget"]).run.optimization.time_budget == 0.5
