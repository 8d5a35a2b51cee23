"""Every option of evaluate, embed, sample and convert has the effect that its help states.

As in test_every_option.py for training, the table at the end has an entry for every option of the four programs. They
run on folders of runs that took no step, and on checkpoints of other programs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cpc_ext.data import Dataset, ImageSet
from cpc_ext.data.images.decode import decode_image
from cpc_ext.evaluation import evaluator
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.interop import load_reference
from cpc_ext.programs import command_line, embedding, sampling
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config, option
from cpc_ext.training.registry import task_class
from tests.tasks.test_every_option import CPU, config_of, dataset_of, noise
from tests.training.conftest import new_run

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("evaluate", "embed", "sample", "convert")
PROGRAMS = {name: importlib.import_module(f"cpc_ext.programs.{name}") for name in NAMES}
pytestmark = pytest.mark.usefixtures("quick_probe")


def do(name: str, *arguments: object) -> None:
    assert PROGRAMS[name].main([*map(str, arguments)]) == 0


def run_in(folder: Path, model: str = "cpc-v1", dataset: Dataset | None = None, **options: Any) -> Path:
    config = config_of(model, device="cpu", precision="fp32", seed=2, **options)
    return new_run(folder, config, dataset or dataset_of(noise()))


# evaluate.


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A function: measure(*options) evaluates a run on twelve images of two classes, and returns the result's rows."""
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset_of(noise(12)))
    monkeypatch.setattr(evaluator, "_save_figure", lambda path, figure: None)
    folders = (tmp_path / f"measured{number}" for number in count())

    def rows(*options: object) -> list[dict[str, Any]]:
        folder = run_in(next(folders))
        do("evaluate", folder, "--device", "cpu", *options)
        return json.loads((folder / "evaluation" / "evaluation.json").read_text())["rows"]

    return rows


KNN = ("--mode", "knn", "--repeats", 1, "--labels")


def evaluate_runs(tmp_path: Path, measure: Callable[..., Any]) -> None:
    first, second = (run_in(tmp_path / name) for name in ("first", "second"))
    do("evaluate", first, second, *KNN, 1, "--device", "cpu")
    for run in (first, second):
        assert json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"]


def evaluate_labels(measure: Callable[..., Any]) -> None:
    rows = measure("--mode", "knn", "--repeats", 1, "--labels", "50%,2")
    assert [(row["labels"], row["label_count"]) for row in rows] == [("2", 4), ("50%", 6)]


def evaluate_mode(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each learns what its help names, three from the same weights; test_evaluator.py knows which."""
    calls: list[tuple[str, float]] = []

    def judge(kind: str, features: Tensor) -> Tensor:
        calls.append((kind, features.double().sum().item()))
        return torch.zeros(12, 2)

    def tune(task: Any, model: Any, images: ImageSet, *arguments: Any, **options: Any) -> Tensor:
        return judge("tuning", task.features(model, torch.from_numpy(images.images)))

    def fit(features: Tensor, *arguments: Any, **options: Any) -> Any:
        return SimpleNamespace(logits=lambda _: judge("classifier", features))

    monkeypatch.setattr(evaluator, "fit_linear_classifier", fit)
    monkeypatch.setattr(evaluator, "knn_scores", lambda features, *arguments, **options: judge("votes", features))
    monkeypatch.setattr(evaluator, "fine_tune", tune)
    everything = ("linear", "knn", "finetune", "supervised", "untrained")
    for text, modes in (("all", everything), ("untrained,knn", ("untrained", "knn"))):
        calls.clear()
        rows = measure("--mode", text, "--repeats", 1, "--labels", "100%")
        assert {row["mode"] for row in rows} == set(modes)
        kinds, sums = zip(*calls, strict=True)
        judges = {"linear": "classifier", "knn": "votes", "untrained": "classifier"}
        assert kinds == tuple(judges.get(mode, "tuning") for mode in modes)
        assert len({round(value, 3) for value in sums}) == {5: 3, 2: 2}[len(modes)]


def evaluate_repeats(measure: Callable[..., Any]) -> None:
    for number in (1, 4):
        rows = measure("--mode", "knn", "--labels", "2,100%", "--repeats", number)
        assert [(row["labels"], len(row["top1"])) for row in rows] == [("2", number), ("100%", 1)]


def tuned(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *options: object) -> list[tuple[Any, ...]]:
    """Every call of fine-tuning: chosen images, recipe and seed."""
    calls = []

    def tune(*arguments: Any, seed: int, **more: Any) -> Tensor:
        chosen, _, recipe = arguments[3:]
        calls.append((chosen.tolist(), recipe, seed))
        return torch.zeros(12, 2)

    monkeypatch.setattr(evaluator, "fine_tune", tune)
    measure("--mode", "finetune,supervised", "--labels", 2, *options)
    return calls


def evaluate_seed(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = ([(c, s) for c, _, s in tuned(measure, monkeypatch, "--seed", n)] for n in (1, 1, 2))
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert one[0] != two[0]
        assert one[1] != two[1]
    # Every draw has a seed and images of its own, and both modes the same ones.
    assert first[:3] == first[3:]
    assert len({seed for _, seed in first}) == 3


def evaluate_neighbours(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images that look nearly alike: each is its own nearest, and four of one class outvote the other."""
    labels = np.array([0, 1, 1, 1, 1])
    split = ImageSet(noise(5), labels)
    data = replace(dataset_of(noise(5)), train=split, test=split)
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: data)
    for number, right in ((1, 1.0), (5, 0.8)):
        (row,) = measure(*KNN, "100%", "--neighbours", number)
        assert row["top1_mean"] == pytest.approx(right)


def updates(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *options: object) -> set[int]:
    """Return the numbers of updates that the recipes of both modes make for forty images."""
    return {recipe.steps(40) for _, recipe, _ in tuned(measure, monkeypatch, *options)}


def evaluate_finetune_epochs(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty images are two batches of at most 32."""
    assert updates(measure, monkeypatch, "--finetune-epochs", 7, "--finetune-steps", 3) == {14}


def evaluate_finetune_steps(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert updates(measure, monkeypatch, "--finetune-epochs", 2, "--finetune-steps", 5) == {5}


def evaluate_per_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset_of(noise(12)))
    run = run_in(tmp_path / "run")
    do("evaluate", run, "--device", "cpu", "--per-module")
    assert len(json.loads((run / "evaluation" / "per_module.json").read_text())["accuracy_by_module"]) == 3
    assert not (run / "evaluation" / "evaluation.json").exists()


def evaluate_data_dir(tmp_path: Path, measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        run_data, "load_dataset", lambda name, folder, **options: asked.append(folder) or dataset_of(noise(12))
    )
    measure(*KNN, 1, "--data-dir", tmp_path)
    monkeypatch.setattr(evaluator, "evaluate_per_module", lambda runs, *arguments: [run.dataset() for run in runs])
    do("evaluate", run_in(tmp_path / "run"), "--device", "cpu", "--per-module", "--data-dir", tmp_path)
    assert asked == [tmp_path, tmp_path]


def on_the_meta_device(name: str, *arguments: object) -> None:
    """Assert that --device takes effect: the meta device raises an error when a result is needed."""
    do(name, *arguments, "--device", "cpu")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        do(name, *arguments, "--device", "meta")


def evaluate_device(tmp_path: Path, measure: Callable[..., Any]) -> None:
    on_the_meta_device("evaluate", run_in(tmp_path / "run"), *KNN, 1)
    on_the_meta_device("evaluate", tmp_path / "run", "--per-module")


def evaluate_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: dataset_of(noise(12)))
    first, second = run_in(tmp_path / "first"), run_in(tmp_path / "second")
    for name, options in (("comparison", (*KNN, 1)), ("accuracy_by_depth", ("--per-module",))):
        do("evaluate", first, second, "--device", "cpu", *options, "--out", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not (first / "evaluation" / f"{name}.png").exists()


# embed.


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images in a folder."""
    (tmp_path / "photos").mkdir()
    for name, image in zip("ab", noise(2, 40), strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


def embedded(tmp_path: Path, *options: object, run: Path | None = None) -> np.ndarray:
    run = run or (tmp_path / "run" if (tmp_path / "run").exists() else run_in(tmp_path / "run"))
    do("embed", run, "--device", "cpu", *options)
    return np.load(run / "features.npy")


def embed_run(tmp_path: Path, photos: Path) -> None:
    for name, encoder in (("wide", "wrn-10-1"), ("small", "resnet:blocks=1-1-1,channels=8-8-24,stem_channels=8")):
        run = run_in(tmp_path / name, encoder=encoder)
        task = EncoderRun.open(run, CPU).trained(dataset_of(noise()))
        assert embedded(tmp_path, "--data-dir", photos, run=run).shape == (2, task.model.encoder.out_channels)


def embed_data_dir(tmp_path: Path, photos: Path) -> None:
    (photos / "deeper").mkdir()
    (photos / "b.png").rename(photos / "deeper" / "b.png")
    both = embedded(tmp_path, "--data-dir", photos)
    assert json.loads((tmp_path / "run" / "features.names.json").read_text()) == ["a.png", "deeper/b.png"]
    np.testing.assert_allclose(embedded(tmp_path, "--data-dir", photos / "deeper"), both[1:], atol=1e-5)


def of_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> tuple[Any, np.ndarray]:
    """Return the requested data sets, and the distances of the encodings from those of images of each split."""
    asked = []
    splits = (ImageSet(images) for images in np.split(noise(6), (1, 3)))
    data = replace(dataset_of(noise()), **dict(zip(("pretrain", "train", "test"), splits, strict=True)))
    monkeypatch.setattr(embedding, "load_dataset", lambda *found, **more: asked.append((*found, more)) or data)
    features = embedded(tmp_path, *options)
    task = EncoderRun.open(tmp_path / "run", CPU).trained(data)
    return asked, np.abs(features - task.features(task.model, torch.from_numpy(noise(6))).numpy()[:, None]).max(2)


def embed_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = of_data_set(tmp_path, monkeypatch, "--dataset", "cifar10", "--data-dir", tmp_path)
    assert asked == [("cifar10", tmp_path, {"image_size": None})]


def embed_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, numbers in (("pretrain", [0]), ("train", [1, 2]), ("test", [3, 4, 5])):
        _, apart = of_data_set(tmp_path, monkeypatch, "--dataset", "stl10", "--split", name)
        assert np.argwhere(apart < 1e-5)[:, 0].tolist() == numbers
        names = json.loads((tmp_path / "run" / "features.names.json").read_text())
        assert names == [f"{name}/{number}" for number in range(len(numbers))]


def embed_image_size(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, shapes = task_class("cpc-v1"), []
    original = task.features
    monkeypatch.setattr(task, "features", lambda task, *a: shapes.append(a[1].shape[2:]) or original(task, *a))
    for options in ((), ("--image-size", 48)):
        embedded(tmp_path, "--data-dir", photos, *options)
    assert shapes == [(32, 32), (48, 48)]
    asked, _ = of_data_set(tmp_path, monkeypatch, "--dataset", "textures", "--image-size", 50)
    assert asked == [("textures", None, {"image_size": 50})]


def embed_per_patch(tmp_path: Path, photos: Path) -> None:
    means, patches = (embedded(tmp_path, "--data-dir", photos, *options) for options in ((), ("--per-patch",)))
    assert patches.shape == (*means.shape, 5, 5)
    np.testing.assert_allclose(patches.mean((2, 3)), means, atol=1e-5)


def embed_device(tmp_path: Path, photos: Path) -> None:
    on_the_meta_device("embed", run_in(tmp_path / "run"), "--data-dir", photos)


def embed_out(tmp_path: Path, photos: Path) -> None:
    expected = embedded(tmp_path, "--data-dir", photos)
    for name in ("x.npy", "x.safetensors"):
        do("embed", tmp_path / "run", "--device", "cpu", "--data-dir", photos, "--out", tmp_path / name)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["features"], expected)


# sample.


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """A function: drawn(*options) returns the images that a PixelCNN's run writes, colour images of 4 by 4 pixels."""
    found: list[np.ndarray] = []
    monkeypatch.setattr(sampling.figures, "save_images", lambda path, images: found.append(images))
    run_in(tmp_path / "pixels", "pixelcnn", dataset_of(noise(4, 4)))

    def draw(*options: object, run: str = "pixels") -> np.ndarray:
        do("sample", tmp_path / run, "--device", "cpu", *options)
        return found.pop()

    return draw


def sample_run(tmp_path: Path, drawn: Callable[..., Any]) -> None:
    run_in(tmp_path / "larger", "pixelcnn", dataset_of(noise(4, 5)))
    assert [drawn("--n", 1, run=name).shape for name in ("pixels", "larger")] == [(1, 3, 4, 4), (1, 3, 5, 5)]


def sample_n(drawn: Callable[..., Any]) -> None:
    for number in (1, 18):
        images = drawn("--n", number)
        assert len({image.tobytes() for image in images}) == number


def sample_class_index(tmp_path: Path, drawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is replaced by one that draws images whose values are their class."""
    run_in(tmp_path / "classes", "gated-pixelcnn", dataset_of(noise(4, 4)), class_conditional=True)
    monkeypatch.setattr(
        "cpc_ext.models.GatedPixelCNN.sample",
        lambda model, count, size, *, labels, **options: labels.view(-1, 1, 1, 1).expand(count, 3, *size).byte(),
    )
    for options, expected in ((("--class", 1), [1] * 3), (("--class", 0), [0] * 3), ((), [0, 1, 0])):
        assert drawn("--n", 3, *options, run="classes")[:, 0, 0, 0].tolist() == expected


def sample_temperature(drawn: Callable[..., Any]) -> None:
    for temperature, alike in ((0, True), (1, False)):
        first, second = (drawn("--n", 1, "--temperature", temperature, "--seed", seed) for seed in (1, 2))
        assert np.array_equal(first, second) == alike


def sample_complete(drawn: Callable[..., Any], photos: Path) -> None:
    """The image, resized to the run's size, comes first; the others have the same upper half."""
    images = drawn("--n", 2, "--complete", photos / "a.png")
    shrunk = Image.fromarray(decode_image(photos / "a.png")).resize((4, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(images[0], np.asarray(shrunk).transpose(2, 0, 1))
    for image in images[1:]:
        assert [np.array_equal(image[:, row], images[0][:, row]) for row in range(4)] == [True, True, False, False]


def sample_rows(drawn: Callable[..., Any], photos: Path) -> None:
    for rows in (0, 3):
        first, image = drawn("--n", 1, "--complete", photos / "a.png", "--rows", rows)
        assert [np.array_equal(image[:, row], first[:, row]) for row in range(4)] == [row < rows for row in range(4)]


def sample_seed(drawn: Callable[..., Any]) -> None:
    first, again, other = (drawn("--n", 2, "--seed", seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def sample_device(tmp_path: Path, drawn: Callable[..., Any]) -> None:
    on_the_meta_device("sample", tmp_path / "pixels", "--n", 1)


def sample_out(tmp_path: Path) -> None:
    run = run_in(tmp_path / "pixels", "pixelcnn", dataset_of(noise(4, 4)))
    for options, path in (((), run / "sampled.png"), (("--out", tmp_path / "a.png"), tmp_path / "a.png")):
        do("sample", run, "--device", "cpu", "--n", 1, *options)
        assert Image.open(path).size > (4, 4)


# convert.

LAYER = ("cpcv2_pytorch.resnet_layer.safetensors", "cpcv2-pytorch")


def converted(tmp_path: Path, *options: object, of: tuple[str, str] = LAYER) -> Any:
    """Convert a checkpoint to a run, and return its config."""
    run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    do("convert", GOLDEN / of[0], "--source", of[1], "--out", run, *options)
    return load_config(run / "config.yaml")


def same_weights(tmp_path: Path, name: str, source: str) -> None:
    do("convert", GOLDEN / name, "--source", source, "--out", tmp_path / name)
    found = load_checkpoint(tmp_path / name / "checkpoint.pt")["model"]
    expected = load_reference(GOLDEN / name, source).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def convert_checkpoint(tmp_path: Path) -> None:
    for name in ("cpcv2_pytorch.cpc_1dir.safetensors", "cpcv2_pytorch.cpc_4dir.safetensors"):
        same_weights(tmp_path, name, "cpcv2-pytorch")


def convert_source(tmp_path: Path) -> None:
    same_weights(tmp_path, "greedy_infomax.modules.safetensors", "greedy-infomax")
    assert load_config(tmp_path / "greedy_infomax.modules.safetensors" / "config.yaml").model == "greedy-infomax"


def convert_to(tmp_path: Path) -> None:
    converted(tmp_path, of=("pixel_cnn_pp.model_1ch.safetensors", "pixel-cnn-pp"))
    do("convert", tmp_path / "run0", "--to", "pixel-cnn-pp", "--out", tmp_path / "back.safetensors")
    before, after = load_file(GOLDEN / "pixel_cnn_pp.model_1ch.safetensors"), load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(value, before[f"state.{name}"]) for name, value in after.items())
    assert len(after) == sum(name.startswith("state.") for name in before)


def convert_dataset(tmp_path: Path) -> None:
    for name in ("stl10", "textures"):
        assert converted(tmp_path, "--dataset", name).data.dataset == name


def convert_data_dir(tmp_path: Path) -> None:
    assert converted(tmp_path, "--data-dir", tmp_path).data.data_dir == tmp_path


def convert_grid_size(tmp_path: Path) -> None:
    for side in (5, 9):
        assert converted(tmp_path, "--grid-size", side, "--image-size", 60).view.grid_size == side


def convert_image_size(tmp_path: Path) -> None:
    for side in (36, 60):
        assert converted(tmp_path, "--image-size", side).view.crop == side
    pixels = ("pixel_cnn_pp.model_1ch.safetensors", "pixel-cnn-pp")
    assert converted(tmp_path, "--image-size", 40, "--dataset", "textures", of=pixels).data.image_size == 40


def convert_patch_size(tmp_path: Path) -> None:
    for side in (8, 12):
        assert converted(tmp_path, "--patch-size", side, "--image-size", 32).view.patch == side


def convert_norm(tmp_path: Path) -> None:
    for kind in ("layer", "instance"):
        assert converted(tmp_path, "--norm", kind).cpc.norm == kind


def convert_out(tmp_path: Path) -> None:
    converted(tmp_path)
    do("convert", tmp_path / "run0", "--to", "cpcv2-pytorch", "--out", tmp_path / "x.safetensors")
    do("convert", tmp_path / "run0", "--to", "cpcv2-pytorch", "--out", tmp_path / "x.pt")
    left, right = load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert left.keys() == right.keys()


EFFECTS: dict[str, Callable[..., None]] = {
    check.__name__: check
    for check in (
        *(evaluate_runs, evaluate_labels, evaluate_mode, evaluate_repeats, evaluate_seed, evaluate_neighbours),
        *(evaluate_finetune_epochs, evaluate_finetune_steps, evaluate_per_module, evaluate_data_dir, evaluate_device),
        *(evaluate_out, embed_run, embed_data_dir, embed_dataset, embed_split, embed_image_size, embed_per_patch),
        *(embed_device, embed_out, sample_run, sample_n, sample_class_index, sample_temperature, sample_complete),
        *(sample_rows, sample_seed, sample_device, sample_out, convert_checkpoint, convert_source, convert_to),
        *(convert_dataset, convert_data_dir, convert_grid_size, convert_image_size, convert_patch_size, convert_norm),
        convert_out,
    )
}


def command_of(program: str) -> type:
    return PROGRAMS[program].main.__self__.command


def is_needed(field: Field[Any]) -> bool:
    return field.default is field.default_factory is MISSING


# Those of runs on speech: test_speech_run.py.
OF_SPEECH = {"evaluate_measures", "evaluate_layer", "evaluate_alignment", "evaluate_minutes"}
OF_SPEECH |= {"embed_layer", "embed_format"}
EVERY = {f"{name}_{field.name}": (name, field) for name in NAMES for field in fields(command_of(name))}
OPTIONS = {name: each for name, each in EVERY.items() if name not in OF_SPEECH}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_has_its_effect(name, request):
    assert name in EFFECTS, f"{option(OPTIONS[name][1].name)} needs a test here that fails when it does nothing"
    look_at(name, request)


def look_at(name: str, request: pytest.FixtureRequest) -> None:
    needed = [each for each in EFFECTS[name].__annotations__ if each != "return"]
    EFFECTS[name](**{each: request.getfixturevalue(each) for each in needed})


@pytest.mark.parametrize("name", [name for name, (_, field) in OPTIONS.items() if not is_needed(field)])
def test_an_option_that_does_nothing_is_noticed(name, request, monkeypatch, capsys):
    """The test above fails where an option has its default, whatever is given."""
    field, parse = OPTIONS[name][1], command_line.parse_command

    def ignoring(command: type, *arguments: Any, **options: Any) -> Any:
        default = "cpu" if field.default is MISSING else field.default
        found = parse(command, *arguments, **options)
        return replace(found, **{field.name: default}) if isinstance(found, command_of(OPTIONS[name][0])) else found

    monkeypatch.setattr(command_line, "parse_command", ignoring)
    with pytest.raises((AssertionError, pytest.fail.Exception, LookupError, ValueError, OSError)):
        look_at(name, request)


def test_no_entry_is_left_over():
    assert set(EFFECTS) == set(OPTIONS)
    assert set(EVERY) >= OF_SPEECH
