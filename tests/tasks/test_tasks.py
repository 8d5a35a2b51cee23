"""Tasks besides their training steps: evaluation, files and figures, and initialization."""

from __future__ import annotations

import json
import math
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import cpc_ext
from cpc_ext import figures, models
from cpc_ext.data import BatchShare, ImageFetcher, ImageSet
from cpc_ext.data.spread import spread
from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.measures.pixel_histogram import static_histogram_bits_per_dim
from cpc_ext.tasks import encoder_task as encoders
from cpc_ext.tasks import pixel_task as pixelcnn
from cpc_ext.tasks.patches import save_patch_figures
from cpc_ext.tasks.pixel_task import build_pixel_model
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.task import Handover, Task
from tests.tasks.test_every_option import (
    CPU,
    ENCODER,
    MODELS,
    TWO_VIEWS,
    WITH_ENCODER,
    OneWeight,
    config_of,
    dataset_of,
    inputs_of,
    noise,
)

PIXELS = ("pixelcnn", "gated-pixelcnn", "pixelcnn++")


def images_of(count: int, side: int = 32, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def task_of(model: str, *, test: ImageSet | None = None, **options: Any) -> Task:
    """Return a task on noise, with small images for pixel models. test: other noise for testing."""
    dataset = dataset_of(images_of(6, 4) if model in PIXELS else noise())
    if test is not None:
        dataset = replace(dataset, test=test)
    return task_class(model)(config_of(model, **options), dataset, CPU)


@pytest.fixture
def roomy(monkeypatch):
    """Pretend that all images fit on the device, and fail if one-off computations upload them."""

    def upload(array, device):
        raise AssertionError

    monkeypatch.setattr("cpc_ext.data.images.fetch.fits", lambda array, device: True)
    monkeypatch.setattr("cpc_ext.data.images.fetch.upload", upload)


@pytest.fixture
def drawn(monkeypatch, roomy):
    """Record the arguments of figures by function name, and the figure written to each file by file name."""
    found: dict[str, Any] = {}
    for module, name in (
        *((figures, name) for name in ("curves", "likelihood_curves", "model_inputs", "nearest_patches")),
        (figures, "curves_by_module"),
    ):

        def draw(*arguments, name=name, **options):
            found[name] = (arguments, options)
            return name

        monkeypatch.setattr(module, name, draw)
    monkeypatch.setattr(figures, "save", lambda path, figure: found.update({path.name: figure}))
    monkeypatch.setattr(
        figures, "save_images", lambda path, images, **options: found.update({path.name: (images, options)})
    )
    return found


def write_metrics(run: RunDir, *records: dict[str, float]) -> None:
    run.metrics.write_text("".join(json.dumps({"step": step, **record}) + "\n" for step, record in enumerate(records)))


# Encoders: their files.


@pytest.mark.parametrize("model", WITH_ENCODER)
def test_an_encoders_file_tells_how_to_build_and_to_feed_it(model, tmp_path, drawn):
    run = RunDir(tmp_path)
    options = {"norm": "batch", "precision": "bf16", "data_dir": Path("images")}
    task = task_of(model, **options)
    # Weights of a channels-last model are not contiguous in memory.
    task.save(run)
    with safe_open(run.encoder, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert weights.keys() == task.model.encoder.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in task.model.encoder.state_dict().items())
    assert set(metadata) == {"format", "cpc_ext", "class", "encoder", "view", "config"}
    assert (metadata["format"], metadata["cpc_ext"], metadata["class"]) == (
        *("pt", cpc_ext.__version__, "ResNetV2Encoder"),
    )
    assert json.loads(metadata["encoder"]) == {
        "blocks": [1, 1, 1],
        "channels": [8, 8, 16],
        "stem_channels": 8,
        "stem": "cifar",
        "norm": "batch",
        "in_channels": 3 if model in TWO_VIEWS else 1,
    }
    assert json.loads(metadata["config"]) == config_of(model, **options).model_dump(mode="json")
    view = json.loads(metadata["view"])
    assert not {"dtype", "augmentation"} & set(view)
    names = ("size", "min_area", "channels_last") if model in TWO_VIEWS else ("patch_size", "stride", "crop", "gray")
    expected = (32, 0.08, True) if model in TWO_VIEWS else (8, 4, 24, True)
    assert tuple(view[name] for name in names) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wrn-10-1", models.WideResNetEncoder),
        ("mobilenetv2:width=0.25", models.MobileNetV2Encoder),
        ("ln-resnet101:blocks=1-1,channels=8-16,expansions=2-2,stem_channels=8", models.LayerNormResNetEncoder),
    ],
)
def test_an_encoders_file_rebuilds_the_encoder(name, kind, tmp_path, drawn):
    run = RunDir(tmp_path)
    task = task_of("cpc-v1", encoder=name)
    task.save(run)
    with safe_open(run.encoder, "pt") as file:
        assert file.metadata()["class"] == kind.__name__
        encoder = kind(**json.loads(file.metadata()["encoder"]))
        encoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    patches = torch.randn(1, 2, 2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(patches), task.model.encoder.eval()(patches))


KEYS = {
    "cpc-v1": (17,),
    "cpc-v2": (25 * 4,),
    "greedy-infomax": (17,),
    "simclr": (2 * 4 - 1,),
    "moco": (16 + 1,),
}


def test_guessing_classes_of_unequal_size():
    """Two of three images share a class, so a guess is right with the squares of both classes' shares: 4/9 + 1/9."""
    task = task_of("supcon")
    task.examples = dataset_of(noise(3)).pretrain
    assert task.guess == pytest.approx({"loss": math.log(2 * 4 - 1), "accuracy": 4 / 9 + 1 / 9})


@pytest.mark.parametrize(
    ("model", "options", "keys"),
    [
        *((model, {}, keys) for model, keys in KEYS.items()),
        ("cpc-v1", {"neg_samples": "all"}, (3 * 5 * 4, 2 * 5 * 4)),
        ("cpc-v1", {"neg_samples": "all", "skip": 0}, (4 * 5 * 4, 3 * 5 * 4)),
        ("greedy-infomax", {"neg_samples": 3}, (4,)),
        ("greedy-infomax", {"modules": 1}, (17,)),
        ("greedy-infomax", {"objective": "supervised", "train_module": 0}, (2,)),
    ],
)
def test_curves_of_what_was_logged_beside_guessing(model, options, keys, tmp_path, drawn):
    run = RunDir(tmp_path)
    task = task_of(model, **options)
    modules = [] if model != "greedy-infomax" else [0] if options.keys() & {"modules", "train_module"} else [0, 1, 2]
    complete = {
        f"{name}{end}": 1.0
        for name in ("loss", "accuracy")
        for end in ([f"_module_{module}" for module in modules] if len(modules) > 1 else [""])
    }
    # Not all is known of other records.
    partly = [{name: 2.0 for name in complete if name != missing} for missing in complete]
    write_metrics(run, complete, *partly, {"found": 3.0}, complete)
    task.save(run)
    name = "curves_by_module" if modules else "curves"
    assert drawn["curves.png"] == name
    (records, *learning, guessing), words = drawn[name]
    assert [record["step"] for record in records] == [0, len(partly) + 2]
    assert learning == ([modules] if modules else [])
    assert guessing == pytest.approx(
        {"loss": np.mean([math.log(key) for key in keys]), "accuracy": np.mean([1 / key for key in keys])}
    )
    assert words.pop("probe") is None
    contrastive = {"loss": "NT-Xent loss" if model == "simclr" else "InfoNCE loss", "accuracy": "contrastive accuracy"}
    assert words == ({"loss": "cross-entropy", "accuracy": "accuracy"} if "objective" in options else contrastive)
    drawn.clear()
    run.metrics.unlink()
    task.save(run)
    assert name not in drawn
    assert drawn["inputs.png"]


def test_curves_are_called_what_they_are():
    records = [{"step": step, "loss": 1.0, "accuracy": 0.5} for step in (1, 2)]
    guess, words = {"loss": 2.0, "accuracy": 0.1}, {"loss": "entropy", "accuracy": "share found"}
    for figure in (figures.curves(records, guess, **words), figures.curves_by_module(records, [1], guess, **words)):
        assert [axes.get_ylabel() for axes in figure.axes] == ["entropy (nats)", "share found"]


@pytest.mark.parametrize("model", WITH_ENCODER)
@pytest.mark.parametrize("every", [None, 7])
def test_curves_have_the_probes_beside_them(model, every, tmp_path, drawn):
    """Also those of a run that has stopped to take any; then nobody knows of chance."""
    run = RunDir(tmp_path)
    task = task_of(model, probe_every=every)
    task.prepare(Ranks(CPU), resumed=False)
    names = ["loss", "accuracy"]
    logged = {f"{name}{end}": 1.0 for name in names for end in ("", *(f"_module_{module}" for module in range(3)))}
    write_metrics(run, {"knn_accuracy": 0.25}, logged, {"knn_accuracy": 0.5})
    task.save(run)
    probe = drawn[drawn["curves.png"]][1]["probe"]
    assert (list(probe.steps), list(probe.accuracy), probe.chance) == ([0, 2], [0.25, 0.5], every and 0.5)


# Encoders: their figures.


@pytest.mark.parametrize("model", ["cpc-v1", "cpc-v2", "greedy-infomax"])
def test_figure_of_what_the_model_gets(model, tmp_path, drawn):
    """Patches are augmented as in training, by the numbers of the run's seed."""
    test = ImageSet(images_of(9))
    task = task_of(model, test=test, patch_augmentation=True, seed=5)
    task.save(RunDir(tmp_path))
    (images, patches), options = drawn["model_inputs"]
    assert drawn["inputs.png"] == "model_inputs"
    assert options == {"crop": 24}
    chosen = test.images[spread(4, 9)]
    assert np.array_equal(images, chosen)
    expected = task._view.augmented(torch.from_numpy(chosen), torch.Generator().manual_seed(5)).float()
    assert patches.dtype == np.float32
    assert np.array_equal(patches, expected.numpy())


def test_figures_are_of_the_training_images_where_there_are_no_others(tmp_path, drawn):
    for model in ("cpc-v1", "simclr"):
        dataset = replace(dataset_of(noise()), test=None)
        task_class(model)(config_of(model), dataset, CPU).save(RunDir(tmp_path))
        images = drawn["model_inputs"][0][0] if model == "cpc-v1" else drawn["inputs.png"][0][:4]
        if model == "cpc-v1":
            assert np.array_equal(images, noise())
        else:
            assert len(images) == 4


@pytest.mark.parametrize(("grid", "labels"), [(5, True), (4, False)])
def test_figure_of_the_nearest_patches(grid, labels, tmp_path, drawn, monkeypatch):
    """By the plain formula: of every other image its patch of the largest cosine, and of these images the nearest."""
    monkeypatch.setattr("cpc_ext.tasks.patches._NEIGHBOUR_IMAGES", 15)
    test = ImageSet(images_of(20), np.arange(20) % 2 if labels else None)
    options = {"grid_size": grid, "crop": {5: 24, 4: 20}[grid], "patch_norm": True}
    task = task_of("cpc-v1", test=test, **options)
    task.save(RunDir(tmp_path))
    assert drawn["neighbours.png"] == "nearest_patches"
    (queries, neighbours, similarities, same), _ = drawn["nearest_patches"]

    shown = spread(15, 20)
    images = torch.from_numpy(test.images[shown])
    codes = task.encodings(task.model, images).permute(0, 2, 3, 1).reshape(15, grid * grid, -1).double()
    codes = F.normalize(codes - codes.mean((0, 1)), dim=2)
    corner = (32 - options["crop"]) // 2
    side, stride = task.config.view.patch, task.config.view.stride

    def pixels(image: int, row: int, column: int) -> np.ndarray:
        top, left = corner + stride * row, corner + stride * column
        return images[image, :, top : top + side, left : left + side].numpy() / 255

    for number, query in enumerate(spread(6, 15)):
        assert queries[number] == pytest.approx(pixels(query, grid // 2, grid // 2), abs=1e-6)
        found = []
        for image in set(range(15)) - {query}:
            cosines = codes[image] @ codes[query, grid // 2 * grid + grid // 2]
            found.append((cosines.max().item(), image, divmod(cosines.argmax().item(), grid)))
        found = sorted(found, reverse=True)[:8]
        assert similarities[number] == pytest.approx([cosine for cosine, _, _ in found], abs=1e-5)
        for patch, (_, image, place) in zip(neighbours[number], found, strict=True):
            assert patch == pytest.approx(pixels(image, *place), abs=1e-6)
        if labels:
            numbers = test.labels[shown]
            assert same[number].tolist() == [numbers[query] == numbers[image] for _, image, _ in found]
    assert (len(queries), same is None) == (6, not labels)


@pytest.mark.parametrize("model", ["cpc-v1", "greedy-infomax"])
@pytest.mark.parametrize(("count", "shown"), [(13, False), (14, True)])
def test_neighbours_need_as_many_images(model, count, shown, tmp_path, drawn):
    task_of(model, test=ImageSet(images_of(count))).save(RunDir(tmp_path))
    assert ("neighbours.png" in drawn) == shown


@pytest.mark.parametrize("has_test", [True, False])
def test_figure_of_the_two_views(has_test, tmp_path, drawn):
    """In a row of images, then in two rows views of each, in colours that are not normalised."""
    test = ImageSet(images_of(9))
    options = {"min_crop_area": 0.3, "blur_kernel": 5, "view_size": 24, "seed": 7}
    task = task_of("simclr", test=test, **options)
    if not has_test:
        task._dataset = replace(task._dataset, pretrain=test, test=None)
    task.save(RunDir(tmp_path))
    pictures, layout = drawn["inputs.png"]
    view = replace(task._view, mean=None, std=None, channels_last=False)
    images = torch.from_numpy(test.images[spread(6, 9)])
    views = view.random_pair(images, torch.Generator().manual_seed(7))
    expected = torch.cat([view.center(images), *views]) * 255
    assert layout == {"columns": 6}
    assert pictures.dtype == np.uint8
    assert np.array_equal(pictures, expected.round().numpy().astype(np.uint8))
    assert task._view.std == (0.2,) * 3


# Evaluation of encoders.


def test_encoders_are_judged_beside_their_untrained_selves(monkeypatch):
    """The probe sees features of both splits with their labels; the weights of the other encoder are the seed's."""
    train, test = (ImageSet(images_of(count, seed=count), np.arange(count) % 2) for count in (6, 5))
    task = task_of("cpc-v1")
    task._dataset = replace(task._dataset, train=train, test=test)
    seen = []

    def probe(train_features, train_labels, test_features, test_labels, *, classes):
        seen.append((train_features, test_features))
        assert (train_labels.tolist(), test_labels.tolist()) == ([0, 1] * 3, [0, 1, 0, 1, 0])
        assert classes == 2
        return types.SimpleNamespace(accuracy=0.25 * len(seen))

    monkeypatch.setattr(encoders, "linear_probe", probe)
    untrained = task.initial_model()
    nn.init.normal_(task.model.encoder.conv1.weight)
    assert task.evaluate() == {
        "probe_accuracy": 0.25,
        "effective_rank": effective_rank(seen[0][0]),
        "untrained_probe_accuracy": 0.5,
        "untrained_effective_rank": effective_rank(seen[1][0]),
        "chance_accuracy": 3 / 5,
    }
    for model, features in zip((task.model, untrained), seen, strict=True):
        for images, found in zip((train, test), features, strict=True):
            patches = task._view.center(torch.from_numpy(images.images))
            expected = model.encode(patches).mean((2, 3))
            torch.testing.assert_close(found, expected.detach())
    assert not torch.allclose(seen[0][0], seen[1][0])


@pytest.mark.parametrize("missing", ["train", "test", "train labels", "test labels"])
def test_without_labels_there_is_no_judgement(missing):
    task = task_of("cpc-v1")
    split, _, labels = missing.partition(" ")
    changed = ImageSet(noise()) if labels else None
    task._dataset = replace(task._dataset, **{split: changed})
    assert task.evaluate() == {}


@pytest.mark.parametrize("model", WITH_ENCODER)
def test_what_is_told_of_the_images(model):
    task = task_of(model)
    task._dataset = replace(task._dataset, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), gray_mean=0.7, gray_std=0.8)
    assert task.description() == {
        "image_shape": [3, 32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "gray_mean": 0.7,
        "gray_std": 0.8,
    }


@pytest.mark.parametrize("model", WITH_ENCODER)
def test_encodings_of_the_centre_and_of_random_views(model):
    """In evaluation mode whatever the model was in, without gradients, in float32; random views are crops and flips."""
    patches = {} if model in TWO_VIEWS else {"patch_norm": True, "patch_augmentation": True}
    task = task_of(model, norm="batch", precision="bf16", **patches)
    images = torch.from_numpy(images_of(3))
    for training in (True, False):
        task.model.train(training)
        found = task.encodings(task.model, images)
        assert task.model.training == training
        assert (found.dtype, found.requires_grad) == (torch.float32, False)
    task.model.eval()
    cropping = task._view.cropping() if model in TWO_VIEWS else replace(task._view, augmentation=None)
    views = task._view.center(images), cropping.random(images, torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        centre, random = (task.model.encode(each) for each in views)
        same = task.encode(task.model, images, torch.Generator().manual_seed(3))
    if model in TWO_VIEWS:
        centre, random = (each[..., None, None] for each in (centre, random))
    torch.testing.assert_close(found, centre.float())
    torch.testing.assert_close(same, random)
    torch.testing.assert_close(task.features(task.model, images), found.mean((2, 3)))
    assert found.shape[2:] == ((1, 1) if model in TWO_VIEWS else (5, 5))


@pytest.mark.parametrize("model", WITH_ENCODER)
def test_views_are_made_in_full_precision(model):
    """Only then are they what the network computes in; those of a step are drawn for all of a batch."""
    task = task_of(model, precision="bf16")
    seen = []
    kind = type(task._view)
    task_view = types.SimpleNamespace(
        **{
            name: lambda *arguments, name=name, **options: (
                seen.append((torch.is_autocast_enabled("cpu"), options.get("share"))),
                getattr(kind, name)(task._original, *arguments, **options),
            )[1]
            for name in ("random", "random_pair", "center", "cropping")
        }
    )
    task._original, task._view = task._view, task_view
    if model == "greedy-infomax":
        task.inputs._view = task_view
    streams = RandomStreams(0, CPU)
    images = torch.from_numpy(noise())
    with torch.autocast("cpu", torch.bfloat16):
        task.losses(images, torch.zeros(4, dtype=torch.int64), streams)
        task.encode(task.model, images)
    assert seen[0][1] is streams.share
    if model in TWO_VIEWS:
        assert [enabled for enabled, _ in seen] == [False, False]


@pytest.mark.parametrize(
    ("model", "options", "stem"),
    [
        ("cpc-v1", {"crop": 24, "patch_size": 12}, "cifar"),
        ("cpc-v1", {"crop": 17, "patch_size": 13, "gray": False}, "stl10"),
        ("cpc-v1", {"crop": 36, "patch_size": 32}, "stl10"),
        ("cpc-v1", {"crop": 37, "patch_size": 33}, "imagenet"),
        ("simclr", {"view_size": 40}, "cifar"),
        ("simclr", {"view_size": 41}, "imagenet"),
    ],
)
def test_stems_fit_the_size_of_what_an_encoder_sees(model, options, stem):
    encoder = ENCODER.replace(",stem=cifar", "")
    task = task_class(model)(config_of(model, encoder=encoder, **options), dataset_of(images_of(2, 40)), CPU)
    arguments = task._encoder_spec.arguments
    colours = 3 if model in TWO_VIEWS or not options.get("gray", True) else 1
    assert (arguments["stem"], arguments["in_channels"]) == (stem, colours)
    # One that takes patches of one size.
    encoder = "ln-resnet101:blocks=1-1,channels=8-16,expansions=2-2,stem_channels=8"
    task = task_class(model)(config_of(model, encoder=encoder, **options), dataset_of(images_of(2, 40)), CPU)
    assert task._encoder_spec.arguments["patch_size"] == options.get("patch_size", options.get("view_size"))


@pytest.mark.parametrize("model", MODELS)
def test_models_are_on_the_device_and_leave_random_numbers_alone(model):
    state = torch.get_rng_state()
    task = task_class(model)(config_of(model), dataset_of(images_of(4, 32)), torch.device("meta"))
    assert {tensor.device.type for tensor in task.model.state_dict().values()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("height", "width"), [(23, 40), (40, 23)])
def test_crops_fit_both_sides_of_an_image(height, width):
    images = noise(2, 40)[:, :, :height, :width]
    with pytest.raises(ValueError, match=r"^--crop 24 is larger than the images of textures, 23 pixels$"):
        task_class("cpc-v1")(config_of("cpc-v1"), dataset_of(images), CPU)
    with pytest.raises(ValueError, match=r", 23 pixels and --pad 1 around them$"):
        task_class("cpc-v1")(config_of("cpc-v1", crop=30, pad=1), dataset_of(images), CPU)
    assert task_class("cpc-v1")(config_of("cpc-v1", pad=1), dataset_of(images), CPU)


@pytest.mark.parametrize(
    ("model", "options", "keys"),
    [
        ("cpc-v1", {"neg_samples": "all"}, (3 * 5, 2 * 5)),
        ("cpc-v2", {}, (25,)),
        ("greedy-infomax", {"neg_samples": "all"}, (3 * 5, 2 * 5)),
        ("simclr", {}, (2 - 1,)),
        ("supcon", {}, (2 - 1,)),
    ],
)
def test_guessing_among_the_keys_of_one_process(model, options, keys):
    """Four processes share a batch of four images, and each contrasts its own."""
    tasks = [task_of(model, gather_negatives=gather, **options) for gather in ("none", "gather")]
    for task in tasks:
        task.share = BatchShare(3, 4)
    assert tasks[0].guess["loss"] == pytest.approx(sum(map(math.log, keys)) / len(keys))
    assert tasks[1].guess == task_of(model, **options).guess


def test_each_processs_queue_of_its_own_goes_on():
    """A checkpoint has the model of the first process alone."""
    queues = [task_of("moco", gather_negatives="none") for _ in range(2)]
    for number, task in enumerate(queues):
        task.model.objective.queue.push(torch.full((3 + number, 8), 1.0 + number), wrap=True)
    kept = {name: torch.cat([task.carried()[name] for task in queues]) for name in queues[0].carried()}
    resumed = task_of("moco", gather_negatives="none")
    resumed.carry_on({name: BatchShare(1, 2).part(rows) for name, rows in kept.items()})
    assert resumed.model.objective.queue.position == 4
    assert torch.equal(resumed.model.objective.queue.keys, queues[1].model.objective.queue.keys)
    assert task_of("moco").carried() == {}


def test_patches_are_drawn_of_images_that_are_encoded_in_batches(tmp_path, monkeypatch):
    task = task_of("cpc-v1")
    images = torch.from_numpy(noise(100))
    sizes, drawn = [], []

    def encodings(some):
        sizes.append(len(some))
        return task.encodings(task.model, some)

    monkeypatch.setattr("cpc_ext.figures.nearest_patches", lambda *given: drawn.append(given))
    monkeypatch.setattr("cpc_ext.figures.save", lambda path, figure: None)
    save_patch_figures(RunDir(tmp_path), task._view, lambda count: (images[:count], None), encodings, 0)
    assert sum(sizes) == 100
    assert max(sizes) <= 32
    ((queries, nearest, similarity, _),) = drawn
    plain = replace(task._view, gray=False, mean=None, std=None, patch_norm=False, dtype=torch.float32)
    shown = plain.center(images).flatten(1, 2).numpy()
    middle = shown[spread(len(queries), 100), shown.shape[1] // 2]
    assert np.array_equal(queries, middle)
    assert nearest.shape == (*similarity.shape, *queries.shape[1:])
    assert all((shown == patch).all((2, 3, 4)).any() for patch in nearest[0])


@pytest.mark.parametrize("model", MODELS)
def test_steps_draw_from_the_streams_of_the_run_alone(model):
    """PyTorch's own generator is left to layers such as dropout."""
    options = {"pixelcnn++": {"dropout": 0.0}, "cpc-v2": {"patch_augmentation": True}}.get(model, {})
    losses = []
    for seed in (0, 1):
        # A step of MoCo changes what the next one sees.
        task = task_of(model, **options, **({"flip": True} if model.startswith(("cpc", "greedy")) else {}))
        images, labels = torch.from_numpy(task.examples.images), torch.from_numpy(task.examples.labels)
        streams = RandomStreams(5, CPU)
        torch.manual_seed(seed)
        losses.append(task.losses(images, labels, streams)["loss"].item())
    assert losses[0] == losses[1]


# Greedy InfoMax.


def greedy(*, trained: bool = False, **options: Any) -> Any:
    return task_of("greedy-infomax", **({"resume_from": "run"} if trained else {}), **options)


def test_the_modules_of_a_step_take_what_those_before_made():
    """The first gets patches; its features go on without their graph, and all contrast at the same places."""
    task = greedy(neg_samples=3)
    images = torch.from_numpy(noise())
    streams = RandomStreams(0, CPU)
    handed, losses, grids, draws = Handover(images), [], 25 * 4, None
    again = task._view.random(images, RandomStreams(0, CPU).views).flatten(0, 2)
    for part, module in zip(task.parts(), task.model.encoder_modules, strict=True):
        values, handed = part(handed, None, streams)
        losses.append(values)
        again = module(again)
        torch.testing.assert_close(handed.features, again)
        assert not handed.features.requires_grad
        assert len(handed.features) == grids
        draws = handed.draws if draws is None else draws
        assert draws is not None
        assert handed.draws is draws
        assert set(values) == {"loss", "accuracy", "mutual_information"}
    total = task.losses(images, None, RandomStreams(0, CPU))
    for name, value in total.items():
        torch.testing.assert_close(value, sum(each[name] for each in losses))
    # One module is the whole encoder, and has the context network to train.
    (whole,) = greedy(modules=1).parts()
    assert whole.context is not None
    assert not hasattr(task.parts()[0], "context")


def test_what_a_module_trains():
    task = greedy()
    for index, part in enumerate(task.parts()):
        mine = {id(parameter) for parameter in part.parameters()}
        theirs = (task.model.encoder_modules[index], task.model.objectives[index])
        assert mine == {id(parameter) for each in theirs for parameter in each.parameters()}


def test_modules_are_compiled_one_by_one():
    task = greedy()
    compiled = []
    for index, module in enumerate(task.model.encoder_modules):
        module.compile = lambda index=index: compiled.append(index)
    task.model.compile = lambda: compiled.append("all")
    task.compile()
    assert compiled == [0, 1, 2]


def test_what_is_judged_is_the_last_module_that_learns():
    images = torch.from_numpy(noise())
    for trained, options in ((1, {"train_module": 1, "trained": True}), (2, {})):
        task = greedy(**options)
        task.model.eval()
        patches = task._view.center(images)
        expected = task.model.encodings_by_module(patches)[trained]
        torch.testing.assert_close(task.encode(task.model, images), expected)
        ran = inputs_of(task.model.encoder_modules[2].blocks, lambda t=task: t.encode(t.model, images))
        assert len(ran) == (trained == 2)


def test_runs_that_a_frozen_module_can_start_from():
    options = {"train_module": 2, "split_at": (1, 2), "trained": True}
    task = greedy(**options)

    def config(**changes: Any) -> Any:
        return config_of("greedy-infomax", **{"train_module": 1, "split_at": (1, 2), "resume_from": "run", **changes})

    for fitting in (config(), config(train_module=2), config(train_module=None), config(lr=0.5), config_of("cpc-v1")):
        task.check_start(fitting)
    with pytest.raises(TrainingError) as caught:
        task.check_start(config(norm="batch", crop=30))
    assert str(caught.value) == (
        "--resume-from: the modules of that run are others: --crop is 30 there, 24 here; --norm is batch there, none "
        "here"
    )
    for changes, said in (
        ({"encoder": "wrn-10-1"}, f"--encoder is wrn-10-1 there, {ENCODER} here"),
        ({"split_at": (2,)}, r"--split-at is \[2\] there, \[1, 2\] here|--split-at is \(2,\) there, \(1, 2\) here"),
        ({"split_at": None, "modules": 2}, "--modules is 2 there, 3 here; --split-at is None there"),
    ):
        with pytest.raises(TrainingError, match=f": {said}"):
            task.check_start(config(**changes))
    with pytest.raises(TrainingError) as caught:
        task.check_start(config(train_module=0))
    assert str(caught.value) == (
        "--resume-from: that run trained module 0; --train-module 2 needs the run that trained module 1"
    )
    # Nothing is frozen.
    greedy(train_module=0).check_start(config(norm="batch", train_module=0))


def test_outputs_are_cached_of_the_seeds_views_by_one_process(tmp_path, monkeypatch):
    filled = []
    monkeypatch.setattr(
        "cpc_ext.tasks.greedy_infomax.module_inputs.OutputCache.fill",
        lambda *arguments, **options: filled.append((arguments, options)),
    )
    options = {"train_module": 1, "cache_outputs": tmp_path, "cache_views": 3, "seed": 4, "flip": True}
    task = greedy(trained=True, **options)
    ranks = Ranks(CPU)
    on_main = []
    monkeypatch.setattr(Ranks, "on_main", lambda self, action: on_main.append(self is ranks) or action())
    task.prepare(ranks, resumed=False)
    (((path, key, images, outputs, device), more),) = filled
    assert (path, images, device, more) == (tmp_path / "module-0.bin", task.examples, CPU, {"views": 3})
    assert on_main == [True]
    batch, generator = torch.from_numpy(noise()), torch.Generator().manual_seed(4)
    for _ in range(2):  # Each view is another.
        patches = task._view.random(batch, generator)
        expected = task.model.encoder_modules[0](patches.flatten(0, 2)).unflatten(0, (4, 25))
        torch.testing.assert_close(outputs(batch), expected.detach())

    def key_of(**changes: Any) -> str:
        return greedy(trained=True, **{**options, **changes}).inputs._cache_key()

    assert key == key_of() == key_of(lr=0.5, cache_outputs=tmp_path / "other")
    changed = [key_of(**each) for each in ({"seed": 5}, {"cache_views": 2}, {"flip": False}, {"precision": "bf16"})]
    other = greedy(trained=True, **options)
    nn.init.zeros_(other.model.encoder_modules[0].blocks[0].conv1.weight)
    more = [other.inputs._cache_key()]
    other = greedy(trained=True, **options)
    nn.init.zeros_(other.model.encoder_modules[1].blocks[0].conv1.weight)
    assert other.inputs._cache_key() == key
    other.inputs._images = ImageSet(images_of(4))
    assert len({key, *changed, *more, other.inputs._cache_key()}) == 7
    last = greedy(trained=True, **{**options, "train_module": 2})
    assert last.inputs._cache_path == tmp_path / "module-1.bin"
    # Without a folder there is nothing to get ready.
    greedy().prepare(Ranks(CPU), resumed=False)
    assert len(filled) == 1


def test_what_the_first_learning_module_gets():
    images, share = torch.from_numpy(noise()), RandomStreams(0, CPU)
    plain = greedy()
    patches = plain._view.random(images, RandomStreams(0, CPU).views)
    assert torch.equal(plain.inputs(images, share), patches.flatten(0, 2))
    frozen = greedy(trained=True, train_module=2)
    expected = frozen.model.encoder_modules[1](frozen.model.encoder_modules[0](patches.flatten(0, 2)))
    found = frozen.inputs(images, RandomStreams(0, CPU))
    torch.testing.assert_close(found, expected.detach())
    frozen.inputs._key = "of a cache that is full"
    assert torch.equal(frozen.inputs(expected.unflatten(0, (4, 25)), share), expected)


def test_supervised_modules_learn_from_the_labelled_images():
    labelled = ImageSet(images_of(5), np.arange(5) % 2)
    dataset = replace(dataset_of(noise()), train=labelled, classes=("a", "b", "c"))
    for objective, images in (("supervised", labelled), ("infonce", dataset.pretrain)):
        task = task_class("greedy-infomax")(config_of("greedy-infomax", objective=objective), dataset, CPU)
        assert task.examples is images
    supervised = task_class("greedy-infomax")(config_of("greedy-infomax", objective="supervised"), dataset, CPU)
    assert [objective.out_features for objective in supervised.model.objectives] == [3, 3, 3]
    handed, labels = Handover(torch.from_numpy(labelled.images)), torch.from_numpy(labelled.labels)
    for index, part in enumerate(supervised.parts()):
        values, handed = part(handed, labels, RandomStreams(0, CPU))
        means = handed.features.unflatten(0, (5, 25)).mean((1, 3, 4))
        expected = F.cross_entropy(supervised.model.objectives[index](means), labels)
        torch.testing.assert_close(values["loss"], expected)
        assert (set(values), handed.draws) == ({"loss", "accuracy"}, None)
    two = config_of("greedy-infomax", objective="supervised", split_at=(1,))
    assert len(task_class("greedy-infomax")(two, dataset, CPU).model.objectives) == 2
    with pytest.raises(ValueError, match="--objective supervised: the images of textures have no labels"):
        task_class("greedy-infomax")(supervised.config, replace(dataset, train=None), CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "timm:resnet18"}, "--encoder timm:resnet18 has no stacks that modules could be made of"),
        (
            {"encoder": "mobilenetv2", "init": "delta-orthogonal"},
            "--init delta-orthogonal is for ResNets, not for --encoder mobilenetv2",
        ),
    ],
)
def test_encoders_that_modules_cannot_be_made_of(options, message, monkeypatch):
    assert greedy(encoder="mobilenetv2:width=0.25", modules=2)
    if "timm" in options["encoder"]:
        spec = types.SimpleNamespace(build=lambda size: nn.Flatten())
        monkeypatch.setattr("cpc_ext.tasks.greedy_infomax.task.patch_encoder", lambda config, dataset: spec)
    with pytest.raises(ValueError, match=message):
        greedy(**options)


def test_modules_contrast_as_they_are_told():
    options = {"pred_steps": 1, "pred_directions": 3, "skip": 2, "neg_samples": "all", "gather_negatives": "ring"}
    for objective in greedy(**options).model.objectives:
        assert {name: getattr(objective, name) for name in options} == options
    (objective,) = greedy(**{**options, "pipeline": True, "split_at": (1,)}).model.objectives[:1]
    assert objective.gather_negatives == "none"


# PixelCNN.


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(pixelcnn, "_SAMPLES", 3)


def bits_of(model: nn.Module, images: np.ndarray, labels: Any = None) -> float:
    with torch.no_grad():
        return model.eval().bits_per_dim(torch.from_numpy(images), labels).item()


# With or without classes.
PIXEL_RUNS = [(model, conditional) for model in PIXELS for conditional in (False, True)[: 1 + (model != "pixelcnn")]]


@pytest.mark.parametrize(("model", "conditional"), PIXEL_RUNS)
def test_pixel_models_are_judged_by_all_images_of_the_test(model, conditional, few_samples, tmp_path, drawn):
    test = ImageSet(images_of(5, 4, seed=2) // 8, np.array([0, 1, 1, 0, 1]))
    task = task_of(model, test=test, ema_decay=0.5, class_conditional=conditional, data_dir=Path("images"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    task.updated()
    averaged = task._evaluated
    assert averaged is not task.model
    train = spread(5, 6)
    labels = {"train": torch.from_numpy(train % 2), "test": torch.from_numpy(test.labels)} if conditional else {}
    expected = {
        "bits_per_dim": bits_of(averaged, test.images, labels.get("test")),
        "train_bits_per_dim": bits_of(averaged, task.examples.images[train], labels.get("train")),
        "static_histogram_bits_per_dim": static_histogram_bits_per_dim(task.examples.images, test.images),
    }
    assert task.evaluate() == pytest.approx(expected, rel=1e-5)
    assert expected["bits_per_dim"] != pytest.approx(expected["train_bits_per_dim"], rel=1e-4)

    run = RunDir(tmp_path)
    run.samples.mkdir()
    assert task.observe(12, run) == pytest.approx({"heldout_bits_per_dim": expected["bits_per_dim"]}, rel=1e-5)
    classes = torch.arange(3) % 2 if conditional else None
    samples = averaged.sample(3, (4, 4), labels=classes, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(drawn["step-000012.png"][0], samples)
    write_metrics(run, {"bits_per_dim": 3.0})
    task.save(run)
    assert np.array_equal(drawn["samples.png"][0], samples)
    assert drawn["curves.png"] == "likelihood_curves"
    (records, baseline), _ = drawn["likelihood_curves"]
    assert records == [{"step": 0, "bits_per_dim": 3.0}]
    assert baseline == expected["static_histogram_bits_per_dim"]
    with safe_open(run.model, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert all(torch.equal(value, weights[name]) for name, value in averaged.state_dict().items())
    assert weights.keys() == averaged.state_dict().keys()
    assert (metadata["format"], metadata["cpc_ext"]) == ("pt", cpc_ext.__version__)
    assert json.loads(metadata["description"]) == task.description()
    assert json.loads(metadata["config"]) == task._config.model_dump(mode="json")
    assert len(metadata) == 4


def test_files_of_a_pixel_model_without_a_log(few_samples, tmp_path, drawn):
    task_of("pixelcnn").save(RunDir(tmp_path))
    assert set(drawn) == {"samples.png"}


@pytest.mark.parametrize(("model", "conditional"), PIXEL_RUNS)
def test_descriptions_build_the_model(model, conditional):
    arguments = {
        "pixelcnn": {"layers": 2, "hidden_channels": 9},
        "gated-pixelcnn": {"layers": 2, "channels": 9},
        "pixelcnn++": {"blocks": 2, "channels": 9, "mixtures": 3, "dropout": 0.25},
    }[model]
    classes = {} if model == "pixelcnn" else {"num_classes": 2 if conditional else None}
    more = {"mixtures": 3, "dropout": 0.25} if model == "pixelcnn++" else {}
    task = task_of(model, layers=2, hidden_channels=9, class_conditional=conditional, **more)
    description = task.description()
    assert description == {
        "model": type(task.model).__name__,
        "arguments": {"in_channels": 3, **arguments, **classes},
        "image_shape": [3, 4, 4],
        "classes": ["0", "1"] if conditional else [],
    }
    found = build_pixel_model(description).state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in task.model.state_dict().items()
    }


def test_held_out_images_on_the_way_are_of_all_of_them(few_samples, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(pixelcnn, "_HELD_OUT_IMAGES", 3)
    test = ImageSet(images_of(9, 4, seed=2))
    task = task_of("pixelcnn", test=test, batch_size=2, precision="bf16")
    run = RunDir(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        expected = bits_of(task.model, test.images[spread(3, 9)])
    assert task.observe(1, run)["heldout_bits_per_dim"] == pytest.approx(expected, rel=1e-3)
    assert run.samples.is_dir()
    assert expected != pytest.approx(bits_of(task.model, test.images[spread(3, 9)]), rel=1e-7)


def test_a_pixel_model_starts_from_weights_and_goes_on_with_its_average():
    first, second = (task_of("pixelcnn", ema_decay=0.5, seed=seed) for seed in (0, 1))
    second.start(first.model.state_dict())
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
        assert torch.equal(value, second._evaluated.state_dict()[name])
    nn.init.normal_(next(first.model.parameters()))
    first.updated()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["average_updates"] == 1
    assert torch.equal(next(second._evaluated.parameters()), next(first._evaluated.parameters()))
    plain = task_of("pixelcnn")
    plain.load_state_dict({})
    assert plain._evaluated is plain.model


@pytest.mark.parametrize("conditional", [False, True])
def test_a_model_that_starts_from_the_data_sees_a_batch_of_the_seed(conditional, monkeypatch, roomy):
    given = []
    monkeypatch.setattr(
        pixelcnn.models.PixelCNNPP, "initialize", lambda self, images, labels: given.append((images, labels))
    )
    for seed, size in ((3, 4), (3, 9)):
        task = task_of("pixelcnn++", data_init=True, seed=seed, batch_size=size, class_conditional=conditional)
        images, labels = given.pop()
        chosen = np.random.default_rng(seed).choice(6, min(size, 6), replace=False)
        assert torch.equal(images, torch.from_numpy(task.examples.images[chosen]))
        assert (labels is None) == (not conditional)
        assert labels is None or labels.tolist() == (chosen % 2).tolist()


def test_images_that_a_pixel_model_does_not_take():
    def refuse(model: str, dataset: Any, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            task_class(model)(config_of(model, **options), dataset, CPU)

    plain = dataset_of(images_of(4, 4))
    refuse("pixelcnn", replace(plain, test=None), "^--dataset textures has no test images to measure the model on$")
    refuse(
        "pixelcnn++", dataset_of(images_of(4, 6)), r"^--model pixelcnn\+\+ on textures: size must be a multiple of 4"
    )
    unlabelled = ImageSet(images_of(4, 4))
    message = "^--class-conditional: the images of textures have no labels$"
    for changes in (
        {"pretrain": unlabelled, "train": None},
        {"pretrain": unlabelled, "train": unlabelled},
        {"test": unlabelled},
    ):
        refuse("gated-pixelcnn", replace(plain, **changes), message, class_conditional=True)
    config = config_of("gated-pixelcnn", class_conditional=True)
    labelled = ImageSet(images_of(4, 4), np.zeros(4, np.int64))
    task = task_class("gated-pixelcnn")(config, replace(plain, pretrain=unlabelled, train=labelled), CPU)
    assert task.examples is labelled
    assert task_class("gated-pixelcnn")(config, replace(plain, train=labelled), CPU).examples is plain.pretrain


def test_mirrored_images_are_those_of_the_whole_batch():
    task = task_of("pixelcnn", mirror=True)
    images, given = torch.from_numpy(images_of(4, 4)), []
    task.model.bits_per_dim = lambda batch, labels: given.append((batch, labels)) or torch.tensor(3.0)
    streams = RandomStreams(2, CPU)
    values = task.losses(images, torch.zeros(4), streams)
    flip = torch.rand(4, generator=RandomStreams(2, CPU).views) < 0.5
    for image, flipped, found in zip(images, flip, given[0][0], strict=True):
        assert torch.equal(found, image.flip(2) if flipped else image)
    assert given[0][1] is None
    assert values["bits_per_dim"].item() == 3.0
    assert values["loss"].item() == pytest.approx(3 * math.log(2))


# Defaults of the base class of tasks.


def test_a_task_is_one_part_and_needs_nothing_else(tmp_path):
    task = OneWeight(config_of("cpc-v1"))
    (part,) = task.parts()
    assert list(part.parameters()) == [task.model.weight]
    given, streams = Handover(torch.ones(2, 1, 1, 1, dtype=torch.uint8)), RandomStreams(0, CPU)
    seen = []
    task.losses = lambda *arguments: seen.append(arguments) or {"loss": torch.tensor(1.0)}
    labels = torch.zeros(2)
    values, handed = part(given, labels, streams)
    assert handed is given
    assert values["loss"].item() == 1
    assert [each is other for each, other in zip(seen[0], (given.features, labels, streams), strict=True)] == [True] * 3
    fetch = task.fetcher(CPU, streams)
    assert isinstance(fetch, ImageFetcher)
    assert fetch(np.array([3, 5])).flatten().tolist() == [3, 5]
    compiled = []
    task.model.compile = lambda: compiled.append(True)
    Task.compile(task)
    assert compiled == [True]
    task.start({"weight": torch.tensor([[7.0]])})
    assert task.model.weight.item() == 7
    assert (task.observe_every, task.observe(1, RunDir(Path(tmp_path))), task.state_dict(), task.description()) == (
        *(None, {}, {}, {}),
    )
