"""The command line and config files: accepted options, displayed defaults, and error messages."""

from __future__ import annotations

import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cpc_ext.data import DATASETS
from cpc_ext.data.images.typical_side import typical_side
from cpc_ext.data_sets import medium, origin
from cpc_ext.programs.train_options import describe, parse
from cpc_ext.tasks.encoder_names import ENCODERS, encoder_spec
from cpc_ext.training import presets
from cpc_ext.training.config import (
    LENGTHS,
    DataSection,
    OptionError,
    RunConfig,
    load_config,
    option,
    options_of_other_models,
)
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import preset
from cpc_ext.training.registry import MODELS, config_class, model_medium, model_presets


def refuse(capsys, *arguments):
    """Return the one-line error message with which the program refuses these arguments."""
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    text = captured.err + captured.out
    assert "Traceback" not in text
    return re.sub(r"[\s│]+", " ", text)


def help_text(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        parse([*arguments, "--help"])
    assert exit_.value.code == 0
    return re.sub(r"[\s│]+", " ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("model", "dataset"),
    [(model, dataset) for model in MODELS for dataset in DATASETS if medium(dataset) == model_medium(model)],
)
def test_presets_are_valid_and_what_the_command_line_starts_from(model, dataset):
    config = preset(model, dataset)
    assert parse(["--model", model, "--dataset", dataset]).run == config
    assert (config.model, config.data.dataset) == (model, dataset)
    for section, values in presets.preset_entry(model, dataset).items():
        if section == "data" and origin(dataset).own_size:
            continue  # Published images and arrays have their own size.
        assert values.items() <= getattr(config, section).model_dump().items()


def test_a_data_set_without_presets_has_those_of_any_images(monkeypatch):
    known = model_presets("cpc-v2")
    monkeypatch.setattr(presets, "model_presets", lambda model: {"folder": known["folder"]})
    folder, stl10 = preset("cpc-v2", "folder"), preset("cpc-v2", "stl10")
    assert (folder.data.image_size, stl10.data.image_size) == (300, None)  # Published images have their own size.
    assert stl10.data.dataset == "stl10"
    assert (stl10.view, stl10.cpc, stl10.optimization) == (folder.view, folder.cpc, folder.optimization)


def test_names_on_the_command_line_are_those_there_are():
    assert get_args(DataSection.model_fields["dataset"].annotation) == DATASETS
    assert get_args(RunConfig.model_fields["model"].annotation) == MODELS


@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        ("resnet161", "ResNetV2Encoder", {"depth": 161, "norm": "layer", "in_channels": 1, "stem": "imagenet"}),
        ("wrn-28-2", "WideResNetEncoder", {"depth": 28, "width": 2, "norm": "layer", "in_channels": 1}),
        ("mobilenetv2", "MobileNetV2Encoder", {"norm": "layer", "in_channels": 1, "strides": "imagenet"}),
        ("timm:resnet18.a1_in1k", "TimmEncoder", {"name": "resnet18.a1_in1k", "in_channels": 1}),
    ],
)
def test_encoders_by_name(name, kind, arguments):
    assert parse(["--encoder", name]).run.cpc.encoder == name
    spec = encoder_spec(name, norm="layer", in_channels=1, stem="imagenet")
    assert (spec.kind.__name__, spec.arguments) == (kind, arguments)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.islower()])
def test_encoders_without_numbers_of_their_own_are_built(name):
    with torch.device("meta"):
        assert encoder_spec(name, norm="batch", in_channels=3, stem="stl10", patch_size=16).build(16).out_channels > 0


def test_rates_of_large_batches_are_taken():
    """You et al. 2017 train ResNet-50 by LARS in batches of 32 768 with rates of 10 and more."""
    assert parse(["--optimizer", "lars", "--lr", "29"]).run.optimization.lr == 29


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ([], 1e-3),
        (["--optimizer", "adam"], 1e-3),  # As the preset has it.
        (["--optimizer", "lars"], 0.5),
        (["--optimizer=sgd"], 0.03),
        (["--optimizer", "sgd", "--lr", "0.2"], 0.2),
        (["--model", "moco", "--dataset", "stl10", "--optimizer", "sgd"], 0.03),
        (["--model", "moco", "--dataset", "stl10", "--optimizer", "lars"], 0.5),
        (["--model", "moco", "--dataset", "stl10", "--optimizer", "adam"], 2e-4),
    ],
)
def test_another_optimizer_has_a_rate_of_its_own(options, lr):
    assert parse(options).run.optimization.lr == lr


def test_another_optimizer_than_an_earlier_runs_has_a_rate_of_its_own(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(parse(["--lr", "0.007"]).run.to_yaml())
    assert parse(["--config", str(path)]).run.optimization.lr == 0.007
    assert parse(["--config", str(path), "--optimizer", "adam"]).run.optimization.lr == 0.007
    assert parse(["--config", str(path), "--optimizer", "lars"]).run.optimization.lr == 0.5


def test_stl10_is_the_published_example():
    config = preset("cpc-v1", "stl10")
    assert (config.view.crop, config.view.patch, config.view.stride, config.view.grid_size) == (64, 16, 8, 7)
    assert (config.cpc.encoder, config.cpc.norm) == ("resnet14", "none")
    assert (config.cpc.pred_steps, config.cpc.neg_samples, config.cpc.skip) == (5, 16, 1)
    assert (config.optimization.lr, config.optimization.batch_size, config.optimization.epochs) == (2e-4, 16, 300)
    assert (config.optimization.schedule, config.optimization.clip_grad) == ("constant", None)
    assert not config.view.gray
    assert config.view.flip
    assert not config.view.patch_norm


def test_options_replace_the_preset():
    run = parse(["--dataset", "stl10", "--neg-samples", "all", "--gray", "--clip-grad", "2.5"]).run
    assert run.cpc.neg_samples == "all"
    assert run.view.gray is True
    assert run.optimization.clip_grad == 2.5
    assert run.optimization.epochs == 300


@pytest.mark.parametrize("arguments", [["--gather-negatives"], ["--gather_negatives", "--seed", "3"]])
def test_gather_negatives_needs_no_value(tmp_path, arguments):
    config = parse(["--dataset", "textures", "--gather-negatives", "ring"]).run
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert config.cpc.gather_negatives == "ring"
    assert parse(["--config", str(tmp_path / "config.yaml"), *arguments]).run.cpc.gather_negatives == "gather"


def test_underscores_do_as_well():
    assert parse(["--dataset=stl10", "--batch_size", "7"]).run.optimization.batch_size == 7


@pytest.mark.parametrize("given", LENGTHS)
@pytest.mark.parametrize("dataset", ["textures", "stl10"])
def test_a_length_replaces_that_of_the_preset(dataset, given):
    optimization = parse(["--dataset", dataset, option(given), "7"]).run.optimization
    assert {name: getattr(optimization, name) for name in LENGTHS} == {**dict.fromkeys(LENGTHS), given: 7}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "1", "--steps", "1"], "give one of --epochs, --steps, --time-budget, not --epochs and --steps"),
        (["--batch-size", "0"], "--batch-size: input should be greater than or equal to 1, got 0"),
        (["--batch-size", "many"], "--batch-size: invalid literal for int() with base 10: 'many'"),
        (["--steps", "1", "--time-budget", "1"], "not --steps and --time-budget"),
        (["--time-budget", "0"], "--time-budget: input should be greater than 0, got 0.0"),
        (["--probe-images", "1"], "--probe-images: input should be greater than or equal to 2, got 1"),
        (["--no-evaluate", "--probe-images", "9"], "--probe-images would have no effect: --no-evaluate measures"),
        (["--lr", "-1"], "--lr: input should be greater than 0, got -1.0"),
        (["--lr", "nan"], "--lr: input should be"),
        (["--lr", "inf"], "--lr: input should be"),
        (["--pred-directions", "5"], "--pred-directions: input should be less than or equal to 4, got 5"),
        (["--neg-samples", "0"], "--neg-samples: input should be greater than or equal to 1, got 0"),
        (
            ["--model", "cpc-v9"],
            "'cpc-v9' for argument '--model'. Expected one of ('cpc-audio', 'cpc-v1', 'cpc-v2', ",
        ),
        (["--dataset", "mnist"], "'mnist' for argument '--dataset'"),
        (["--encoder", "vgg"], "--encoder: expected one of resnet-small, resnet14,"),
        (
            ["--encoder", "wrn-27-2"],
            "is 4 plus a positive multiple of 6, its width at least 1, as in wrn-28-2, got",
        ),
        (["--encoder", "wrn-28-0"], "its width at least 1, as in wrn-28-2, got 'wrn-28-0'"),
        (["--encoder", "timm:"], "mobilenetv2, timm:NAME (such as wrn-28-2), got 'timm:'"),
        (["--precision", "fp8"], "Expected one of ('fp32', 'bf16', 'fp16')"),
        (["--device", "toaster"], "--device: expected a name like cpu, cuda or cuda:1, got 'toaster'"),
        (["--crop", "50", "--grid-size", "6"], "use a multiple of 7 such as 49, or give --patch-size"),
        (["--patch-size", "17"], "crop - patch size must be a positive multiple of grid size - 1 = 5"),
        (["--patch-size", "90"], "--patch-size 90 is larger than --crop 56"),
        (["--pred-steps", "5"], "--grid-size 6 has only 5 rows below the first"),
        (["--bacth-size", "3"], "--batch-size"),
        (["--steps"], "--steps"),
        (
            ["--model", "pixelcnn", "--crop=30"],
            "--crop is an option of --model cpc-v1, cpc-v2, greedy-infomax; pixelcnn has no such option",
        ),
        (["--model", "gated-pixelcnn", "--no-gray"], "--gray is an option of --model cpc-v1, cpc-v2"),
        (
            ["--layers", "3"],
            "--layers is an option of --model gated-pixelcnn, pixelcnn, pixelcnn++; cpc-v1 has no such option",
        ),
        (["--model", "pixelcnn", "--layers", "0"], "--layers: input should be greater than or equal to 1, got 0"),
        (["--model", "pixelcnn", "--class-conditional"], "--class-conditional needs --model gated-pixelcnn or"),
    ],
)
def test_wrong_options_name_the_option_and_what_is_allowed(capsys, arguments, expected):
    assert expected in refuse(capsys, *arguments)


def test_help_shows_the_defaults_of_the_data_set(capsys):
    assert "--crop INT Side in pixels of the square cut out of an image at a random place. (default: 56)" in help_text(
        capsys
    )
    assert "at a random place. (default: 64)" in help_text(capsys, "--dataset", "stl10")


@pytest.mark.parametrize("model", MODELS)
def test_help_explains_every_option_of_a_model(capsys, model):
    text = help_text(capsys, "--model", model)
    for name in options_of_other_models(config_class(model)):
        assert f"--{name.replace('_', '-')} " not in text
    for section in config_class(model).model_fields.values():
        for name, field in getattr(section.annotation, "model_fields", {}).items():
            assert f"--{name.replace('_', '-')}" in text
            assert " ".join(field.description.split()) in text


@pytest.mark.parametrize("model", MODELS)
def test_description_gives_the_same_run_again(model):
    config = preset(model, "cifar10" if model_medium(model) == "images" else "librispeech")
    lines = describe(config).splitlines()
    sections = [line.split()[0] for line in lines]
    assert sections == [name for name in type(config).model_fields if name in sections]
    options = [word for line in lines for word in line.split()[1:]]
    assert parse(options).run == config
    assert lines[0] == f"  model         --model {model}"
    assert [len(line) - len(line.lstrip()) for line in lines] == [2] * len(lines)


def test_values_are_described_as_a_shell_takes_them():
    options = ["--model", "greedy-infomax", "--split-at", "1", "2", "--dataset", "folder", "--data-dir", "my images"]
    text = describe(parse([*options, "--lr", "0.00020", "--no-flip", "--device", "cpu"]).run)
    for words in ("--split-at 1 2", "--data-dir 'my images'", "--lr 0.0002 ", "--no-flip", "--device cpu"):
        assert words in text
    assert "None" not in text


def test_sections_that_decide_nothing_have_no_line():
    lines = describe(parse(["--no-evaluate"]).run).splitlines()
    assert "probe" not in [line.split()[0] for line in lines]
    assert all(len(line.split()) > 1 for line in lines)


def test_help_names_all_kinds_of_own_files(capsys):
    text = help_text(capsys).partition("--data-dir")[2].partition("--download")[0]
    own = [name for name in DATASETS if origin(name).folder in ("folders", "arrays")]
    assert {"codes", "npy", "audio-folder"} < set(own)
    assert f"a kind of files: {', '.join(own)} (all but folder and audio-folder also take a single file)" in text


def test_earlier_runs_give_the_options_of_those_that_go_on_or_start_from_them(tmp_path):
    config = preset("cpc-v2", "cifar10", device="cpu")
    (tmp_path / "config.yaml").write_text(config.to_yaml())

    def changed(**optimization):
        return config.model_copy(update={"optimization": config.optimization.model_copy(update=optimization)})

    resumed = parse(["--resume", "--out-dir", str(tmp_path), "--epochs", "7"])
    assert (resumed.resume, resumed.out_dir, resumed.config) == (True, tmp_path, None)
    assert resumed.run == changed(epochs=7)
    for model in ([], ["--model", "cpc-v2"]):
        started = parse(["--resume-from", str(tmp_path), "--lr", "0.5", *model])
        assert (started.resume, started.out_dir) == (False, None)
        assert started.run == changed(resume_from=tmp_path, lr=0.5)
    for options, message in (
        (["--resume-from", str(tmp_path), "--model", "cpc-v1"], "is a run of cpc-v2, not of --model cpc-v1"),
        (["--resume-from", str(tmp_path / "none")], "^--resume-from: cannot read .*/none/config.yaml"),
        (["--resume", "--resume-from", str(tmp_path)], "starts a new one from another's weights: give either$"),
        (["--resume"], "^--resume needs --out-dir"),
    ):
        with pytest.raises(TrainingError, match=message):
            parse(options)


def test_the_device_of_the_command_line_decides_the_precision(monkeypatch):
    monkeypatch.setattr("cpc_ext.training.presets.default_device", lambda: "cuda")
    monkeypatch.setattr("cpc_ext.training.presets.default_precision", {"cuda": "bf16", "cpu": "fp32"}.get)
    for options, device, precision in (([], "cuda", "bf16"), (["--device", "cpu"], "cpu", "fp32")):
        compute = parse(options).run.compute
        assert (compute.device, compute.precision) == (device, precision)
        compute = preset("cpc-v1", "textures", device=options[1] if options else None).compute
        assert (compute.device, compute.precision) == (device, precision)


def test_values_that_are_called_like_options_are_values():
    for name in ("layers", "download", "no_gray", "gather-negatives"):
        assert str(parse(["--out-dir", name]).out_dir) == name


def test_refusals_name_the_program(capsys):
    """Options of other models, without effect, or that do not go together are refused with the program's name."""
    for options in (["--layers", "3"], ["--download"], ["--pred-steps", "5"]):
        with pytest.raises(SystemExit):
            parse(options, prog="another program")
        said = capsys.readouterr().err
        assert said.startswith("error: --")
        assert said.endswith("\nFor full helptext, see another program --help\n")


def test_the_first_pass_takes_underscores_and_leaves_values(tmp_path):
    for name in ("out_dir", "out-dir"):
        with pytest.raises(TrainingError, match=r"--resume: there is no checkpoint at .*/a_run/checkpoint\.pt"):
            parse(["--resume", f"--{name}", str(tmp_path / "a_run")])
        with pytest.raises(TrainingError, match=r"--resume: there is no checkpoint at .*/a_run/checkpoint\.pt"):
            parse(["--resume", f"--{name}={tmp_path / 'a_run'}"])


def test_the_home_folder_after_an_equals_sign(monkeypatch):
    """Shells leave ~ as it is there."""
    monkeypatch.setenv("HOME", "/home/me")
    command = parse(["--out-dir=~/runs/one", "--dataset=folder", "--data-dir=~/a=b", "--steps=3"])
    assert (command.out_dir, command.run.data.data_dir) == (Path("/home/me/runs/one"), Path("/home/me/a=b"))
    with pytest.raises(TrainingError, match=r"there is no checkpoint at /home/me/there/checkpoint\.pt"):
        parse(["--resume", "--out-dir=~/there"])


def test_groups_of_the_help_are_told_by_their_sections(capsys):
    class Mine(RunConfig):
        """A section of one's own beside those of any run."""

        more: DataSection

    assert Mine.model_fields["more"].description == DataSection.__doc__
    text = help_text(capsys)
    for field in config_class("cpc-v1").model_fields.values():
        if hasattr(field.annotation, "model_fields"):
            assert field.annotation.__doc__ in text
    assert "in minutes on two CPU cores. Options and defaults shown are those of the model" in text


def test_a_field_of_several_types_is_named_once_each():
    class Several(DataSection):
        image_size: int | bool = 16

    with pytest.raises(OptionError, match=r"^--image-size: .*\n--image-size: .*$"):
        Several(image_size="large")


def test_long_values_are_cut_in_messages(tmp_path):
    for length, shown in ((198, f"got '{198 * 'x'}'"), (199, f"got '{199 * 'x'}...")):
        (tmp_path / "config.yaml").write_text(f"optimization: {{steps: {length * 'x'}}}")
        with pytest.raises(TrainingError) as caught:
            load_config(tmp_path / "config.yaml")
        assert str(caught.value).endswith(shown)


def test_config_file_round_trip(tmp_path):
    config = preset("cpc-v1", "stl10")
    assert list(yaml.safe_load(config.to_yaml())) == list(type(config).model_fields)
    of_files = parse(["--dataset", "folder", "--data-dir", "my images"]).run
    (tmp_path / "files.yaml").write_text(of_files.to_yaml())
    assert load_config(tmp_path / "files.yaml") == of_files
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    changed = parse(["--config", str(tmp_path / "config.yaml"), "--lr", "0.01", "--steps", "9"]).run
    assert changed.optimization.lr == 0.01
    assert changed.optimization.steps == 9
    assert changed.optimization.epochs is None
    assert changed.cpc == config.cpc


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot read"),
        ("a: [", "is not a YAML file"),
        ("just text", "does not hold a run's options"),
        ("optimization: {steps: 3}\nfoo: 1", "foo: there is no such option"),
        ("optimization: {steps: 3, speed: 9}", "speed: there is no such option"),
        ("optimization: {steps: 3, lr: fast}", "--lr: input should be a valid number"),
        ("optimization: {steps: 3}\ncpc: {pred_steps: 0}", "--pred-steps: input should be greater than or equal to 1"),
        ("optimization: {lr: 0.1}", "give one of --epochs, --steps, --time-budget"),
        ("model: cpc-v9\noptimization: {steps: 3}", "--model: input should be 'cpc-audio', 'cpc-v1', "),
        ("model: 3\noptimization: {steps: 3}", "--model: input should be 'cpc-audio', 'cpc-v1', "),
    ],
)
def test_wrong_config_files(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TrainingError, match=re.escape(expected)):
        parse(["--config", str(path)])


def test_config_file_of_another_model(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(preset("pixelcnn", "textures").to_yaml())
    assert "--model cpc-v1 has other options" in refuse(
        capsys, "--config", str(tmp_path / "config.yaml"), "--model", "cpc-v1"
    )
    run = parse(["--config", str(tmp_path / "config.yaml"), "--model", "gated-pixelcnn"]).run
    assert run.pixelcnn == preset("pixelcnn", "textures").pixelcnn


def test_config_and_resume_exclude_each_other(tmp_path):
    with pytest.raises(TrainingError, match="either --resume or --config"):
        parse(["--config", str(tmp_path), "--resume"])


@pytest.fixture
def folder_of_images(tmp_path):
    """A function: folder_of_images(side) makes a folder of images with that shorter side, another image and a text."""

    def make(side: int):
        (tmp_path / "cats").mkdir()
        for number in range(3):
            Image.new("RGB", (side, side + 8)).save(tmp_path / "cats" / f"{number}.png")
        Image.new("L", (500, 500)).save(tmp_path / "one.png")
        (tmp_path / "notes.txt").write_text("no image")
        return str(tmp_path)

    return make


@pytest.mark.parametrize("model", [model for model in MODELS if "folder-small" in model_presets(model)])
@pytest.mark.parametrize(("side", "key"), [(32, "folder-small"), (63, "folder-small"), (64, "folder"), (400, "folder")])
def test_the_size_of_the_images_in_a_folder_chooses_the_defaults(folder_of_images, model, side, key):
    arguments = ["--model", model, "--dataset", "folder", "--data-dir", folder_of_images(side)]
    expected = model_presets(model)[key]["optimization"]
    assert expected.items() <= parse(arguments).run.optimization.model_dump().items()
    # --image-size takes precedence over the images' own size.
    small = parse([*arguments, "--image-size", "32"]).run
    assert model_presets(model)["folder-small"]["optimization"].items() <= small.optimization.model_dump().items()


@pytest.mark.parametrize("model", [model for model in MODELS if "audio-folder-small" in model_presets(model)])
def test_the_length_of_the_recordings_in_a_folder_chooses_the_defaults(tmp_path, model):
    """Two files in two folders, of a sample a second: together two hours, or a minute less."""
    soundfile = pytest.importorskip("soundfile", reason="needs cpc_ext[audio]")
    for minutes, key in ((119, "audio-folder-small"), (120, "audio-folder")):
        for number, length in enumerate((60, minutes - 60)):
            (tmp_path / f"{number}").mkdir(exist_ok=True)
            soundfile.write(tmp_path / f"{number}" / "a.wav", np.zeros(60 * length, np.int16), 1)
        (tmp_path / "0" / "broken.wav").write_bytes(b"no sound")
        options = ["--model", model, "--dataset", "audio-folder", "--data-dir", str(tmp_path)]
        run, expected = parse(options).run, model_presets(model)[key]
        assert run.encoder.norm == expected.get("encoder", {}).get("norm", "none")
        assert expected["optimization"].items() <= run.optimization.model_dump().items()
    for nothing in (tmp_path / "nowhere", tmp_path / "2"):
        nothing.with_name("2").mkdir(exist_ok=True)
        options = ["--model", model, "--dataset", "audio-folder", "--data-dir", str(nothing)]
        assert parse(options).run.encoder.norm == "none"


def test_links_to_folders_tell_the_size_and_thumbnails_do_not(folder_of_images, tmp_path):
    """As whoever loads the images takes them; one of the links leads in a circle."""
    large = Path(folder_of_images(96))
    for place in (tmp_path / "links" / "@eaDir", tmp_path / "links" / ".hidden"):
        place.mkdir(parents=True)
        for number in range(30):
            Image.new("RGB", (20, 20)).save(place / f"{number}.png")
    (tmp_path / "links" / "train").symlink_to(large)
    (tmp_path / "links" / "again").symlink_to(tmp_path / "links")
    assert typical_side(tmp_path / "links") == 96


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_a_folder_that_tells_no_size_has_the_defaults_of_any(tmp_path, place):
    (tmp_path / "empty").mkdir()
    arguments = ["--model", "simclr", "--dataset", "folder", "--data-dir", str(tmp_path / place)]
    assert parse(arguments).run.simclr == preset("simclr", "folder").simclr


def test_few_heads_tell_the_size(tmp_path, monkeypatch):
    for folder, side in (("a", 20), ("b", 40), ("c", 60)):
        (tmp_path / folder).mkdir()
        for number in range(30):
            Image.new("L", (side, side)).save(tmp_path / folder / f"{number}.png")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    assert typical_side(tmp_path) == 40
    assert len(opened) == 24
    (tmp_path / "a" / "0.png").write_bytes(b"broken")
    assert typical_side(tmp_path) == 40
    assert typical_side(tmp_path / "a" / "1.png") == 20
    assert typical_side(tmp_path / "nowhere") is None


def tells_that_images_have_28_pixels(path, dataset):
    """Assert that a file and its folder choose the defaults for 28 pixels, and a truncated file the general ones."""
    assert typical_side(path) == typical_side(path.parent) == 28
    arguments = ["--model", "simclr", "--dataset", dataset, "--data-dir"]
    assert parse([*arguments, str(path.parent)]).run.simclr == preset("simclr", "folder", side=28).simclr
    path.write_bytes(path.read_bytes()[:40])
    assert typical_side(path) is None
    assert parse([*arguments, str(path)]).run.simclr == preset("simclr", "folder").simclr


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.parquet", "a.arrow"])
def test_heads_in_shards_and_tables_tell_the_size(tmp_path, name):
    encoded = BytesIO()
    Image.new("RGB", (30, 28)).save(encoded, "PNG")
    path = tmp_path / name
    if name.startswith("a.t"):
        with tarfile.open(path, "w:gz" if name.endswith("tgz") else "w") as archive:
            for number, content in enumerate((b"7", encoded.getvalue(), b"{}", encoded.getvalue())):
                member = tarfile.TarInfo(f"{number // 2}.{'cls' if number % 2 == 0 else 'png'}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"image": [{"bytes": encoded.getvalue(), "path": None}] * 20, "label": [0] * 20})
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    tells_that_images_have_28_pixels(path, "webdataset" if name.startswith("a.t") else "huggingface")


@pytest.mark.parametrize(
    ("model", "side", "image_size"),
    [
        ("cpc-v1", 28, 32),
        ("cpc-v2", 28, 32),
        ("greedy-infomax", 31, 32),
        ("cpc-v1", 32, None),
        ("cpc-v1", 48, None),
        ("cpc-v2", 96, 300),
        ("simclr", 28, None),
        ("pixelcnn", 28, None),
    ],
)
def test_arrays_are_enlarged_where_views_would_not_fit(tmp_path, model, side, image_size):
    np.save(tmp_path / "images.npy", np.zeros((4, side, side), np.uint8))
    arguments = ["--model", model, "--dataset", "npy", "--data-dir", str(tmp_path)]
    assert parse(arguments).run.data.image_size == image_size
    assert parse([*arguments, "--image-size", "64"]).run.data.image_size == 64


@pytest.mark.parametrize("name", ["images.npy", "all.npz", "all.h5"])
def test_heads_of_arrays_tell_the_size(tmp_path, name):
    images, labels = np.zeros((5, 28, 30, 3), np.uint8), np.zeros(5, np.int64)
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, images.transpose(0, 3, 1, 2))
    elif name.endswith("npz"):
        np.savez_compressed(path, x_train=images, y_train=labels, x_test=images[..., 0])
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.create_dataset("train/images", data=images, chunks=(1, 28, 30, 3))
            file.create_dataset("train/labels", data=labels)
    tells_that_images_have_28_pixels(path, "hdf5" if name.endswith("h5") else "npy")
