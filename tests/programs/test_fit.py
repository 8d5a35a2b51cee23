"""`cpc_ext.fit`: the same runs and files as the command line's, also with data given as Python objects."""

import json
import os
import signal
import threading

import numpy as np
import pytest
import yaml

import cpc_ext
from cpc_ext.data import make_textures
from cpc_ext.programs import evaluate, train, train_options, training
from cpc_ext.programs import fit as fit_module
from cpc_ext.programs.fit import fit
from cpc_ext.training.config import OptionError, options_that_may_change
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import preset
from cpc_ext.training.registry import MODELS, model_medium
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import SMALL, TIMES, TINY

pytestmark = [pytest.mark.usefixtures("cache", "quick_ends"), pytest.mark.filterwarnings("ignore:dataset:UserWarning")]
ARGUMENTS = (*TINY, *SMALL)
OPTIONS = {
    name.removeprefix("--").replace("-", "_"): yaml.safe_load(value)
    for name, value in zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True)
}
TEXTURES = {split: make_textures(40, split=split, size=32) for split in ("train", "test")}
IMAGES, TEST = (
    [(pixels.transpose(1, 2, 0), label) for pixels, label in zip(part.images, part.labels, strict=True)]
    for part in TEXTURES.values()
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(path):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(path)]


def test_the_run_is_that_of_the_command_line(home):
    fitted = cpc_ext.fit("cpc-v1", IMAGES, test=TEST, out_dir=home / "fitted", **OPTIONS)
    config = yaml.safe_load((home / "fitted" / "config.yaml").read_text())
    assert config["data"]["dataset"] == "npy"
    place = config["data"]["data_dir"]
    assert train.main([*ARGUMENTS, "--dataset", "npy", "--data-dir", place, "--out-dir", str(home / "typed")]) == 0
    names = sorted(path.name for path in (home / "typed").iterdir())
    assert sorted(path.name for path in fitted.path.iterdir()) == names
    assert {"checkpoint.pt", "encoder.safetensors", "summary.json", "curves.png", "neighbours.png"} <= {*names}
    assert (home / "fitted" / "config.yaml").read_text() == (home / "typed" / "config.yaml").read_text()
    assert metrics(home / "fitted" / "metrics.jsonl") == metrics(home / "typed" / "metrics.jsonl")
    assert (home / "fitted" / "encoder.safetensors").read_bytes() == (
        home / "typed" / "encoder.safetensors"
    ).read_bytes()
    typed = json.loads((home / "typed" / "summary.json").read_text())
    assert fitted.summary["probe_accuracy"] == typed["probe_accuracy"] > 0
    assert fitted.summary["steps"] == 8


@pytest.mark.parametrize("side", [32, 64])
def test_the_size_of_the_images_chooses_the_defaults(monkeypatch, side):
    started = []
    monkeypatch.setattr(training, "_train", lambda config, *given, **more: started.append(config) or 0)
    images = np.zeros((6, side, side + 4, 3), np.uint8)
    for dataset in (images, (images, [0, 1] * 3), list(images), {"train": images, "test": images}):
        cpc_ext.fit("simclr", dataset)
        expected = preset("simclr", "folder", side=side)
        run = started.pop()
        assert (run.simclr, run.optimization) == (expected.simclr, expected.optimization)
        assert (
            run
            == train_options.parse(["--model", "simclr", "--dataset", "npy", "--data-dir", str(run.data.data_dir)]).run
        )
    # An iterator, which can be read only once, is not read to choose defaults.
    cpc_ext.fit("simclr", iter(images))
    assert started.pop().simclr == preset("simclr", "folder").simclr


def test_it_goes_on_as_if_it_had_not_stopped(home):
    whole = fit("cpc-v1", IMAGES, test=TEST, **OPTIONS, schedule="constant")
    assert whole.path.resolve() == home / "runs" / "cpc-v1-npy-001"
    first = fit("cpc-v1", IMAGES, test=TEST, **OPTIONS | {"steps": 3}, schedule="constant")
    again = fit(dataset=IMAGES, test=TEST, out_dir=first.path, resume=True, steps=5)
    assert again.path == first.path
    assert train.main(["--resume", "--out-dir", str(first.path), "--steps", "8"]) == 0
    assert (first.path / "encoder.safetensors").read_bytes() == (whole.path / "encoder.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="the data changed since step 8 was saved: 40 images then, 30 now"):
        fit(dataset=IMAGES[:30], test=TEST, out_dir=first.path, resume=True, steps=9)


def test_its_encoder_is_evaluated(home, capsys):
    fitted = fit("cpc-v1", IMAGES, test=TEST, **OPTIONS)
    assert (
        evaluate.main([str(fitted.path), "--labels", "50%", "--repeats", "1", "--mode", "knn", "--device", "cpu"]) == 0
    )
    assert "50%" in capsys.readouterr().out
    assert (fitted.path / "evaluation").is_dir()


def test_data_sets_have_names(home):
    fitted = fit("cpc-v1", "npy", data_dir=_kept(home), out_dir=home / "run", **OPTIONS)
    assert fitted.summary["dataset"] == "npy"
    repeated = fit(config=fitted.path / "config.yaml", steps=4)
    assert metrics(repeated.path / "metrics.jsonl")[0] == metrics(fitted.path / "metrics.jsonl")[0]
    assert repeated.summary["steps"] == 4
    started = fit(resume_from=fitted.path, steps=2)
    assert yaml.safe_load((started.path / "config.yaml").read_text())["optimization"]["resume_from"] == str(fitted.path)


def _kept(home):
    folder = home / "arrays"
    folder.mkdir()
    np.savez(folder / "all.npz", **{f"{split}_images": part.images for split, part in TEXTURES.items()})
    return folder


def test_images_are_brought_to_the_size_that_the_options_ask_for(monkeypatch):
    configs = []
    monkeypatch.setattr(training, "_train", lambda config, *given, **more: configs.append(config) or 0)
    fit(dataset=IMAGES)
    fit("simclr", IMAGES, image_size=24)
    for model, side in (("cpc-v1", 100), ("cpc-v2", 100), ("pixelcnn", 100), ("cpc-v2", 40)):
        # The last three have a size for images of the user's own, and views of the second would not fit otherwise.
        fit(model, [np.zeros((side + n, side + 10, 3), np.uint8) for n in range(4)])
    assert [config.data.image_size for config in configs] == [None, 24, None, 300, None, None]
    sizes = [np.load(config.data.data_dir / "train_images.npy").shape[-1] for config in configs]
    assert sizes == [32, 24, 96, 300, 32, 32]
    assert configs[0].model == "cpc-v1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": [np.zeros((8, 8), np.uint8)]}, "model: expected a name, and the data set after it, got list$"),
        ({"data_dir": "photos"}, "--dataset textures is drawn, and reads no files; --dataset names the kind of yours"),
        ({"model": "cpc-v3"}, "model: expected one of cpc-audio, .* got 'cpc-v3'"),
        ({"dataset": "photos"}, "dataset: expected one of textures, .* got 'photos'; files are named by data_dir"),
        ({"stepz": 3}, "stepz: there is no such option; did you mean steps"),
        ({"xyzzy": 3}, "xyzzy: there is no such option$"),
        ({"modules": 2}, "--modules is an option of --model greedy-infomax, .* cpc-v1 has no such option"),
        ({"steps": 0}, "--steps: input should be greater than or equal to 1, got 0"),
        ({"steps": 1, "epochs": 1}, "give one of --epochs, --steps, --time-budget, not --epochs and --steps"),
        ({"download": True}, "--download would have no effect: --dataset textures is drawn"),
        ({"dataset": IMAGES, "data_dir": "x"}, "data_dir and download would have no effect"),
        ({"test": IMAGES}, "test, unlabeled, classes and workers are of a dataset that is handed over"),
        ({"dataset": "textures", "workers": 2}, "test, unlabeled, classes and workers are of"),
        ({"model": "cpc-audio", "dataset": IMAGES}, "dataset: --model cpc-audio learns from audio"),
        ({"model": "cpc-audio", "dataset": "stl10"}, "--dataset stl10 has no audio"),
        ({"encoder": "resnet9000"}, "--encoder"),
    ],
)
def test_wrong_options_are_one_line(arguments, message):
    with pytest.raises(OptionError, match=message) as caught:
        fit(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume": True}, "--resume needs --out-dir"),
        ({"resume": True, "out_dir": "none"}, "--resume: there is no checkpoint"),
        ({"config": "none.yaml"}, "--config: cannot read"),
        ({"resume": True, "out_dir": "x", "resume_from": "y"}, "--resume goes on with a run, --resume-from starts"),
    ],
)
def test_runs_that_are_not_there(arguments, message):
    with pytest.raises(TrainingError, match=message):
        fit(**arguments)


def test_a_stopped_run_is_saved_and_said(home, monkeypatch, capsys):
    def stopped_by(number):
        taken = training._take_steps

        def stopping(trainer, log, run, ranks, **options):
            before = trainer._task.losses

            def losses(*arguments):
                os.kill(os.getpid(), number)
                return before(*arguments)

            trainer._task.losses = losses
            return taken(trainer, log, run, ranks, **options)

        return stopping

    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        with monkeypatch.context() as patch:
            patch.setattr(training, "_take_steps", stopped_by(number))
            with pytest.raises(kind) as caught:
                fit("cpc-v1", IMAGES, test=TEST, out_dir=home / number.name, **OPTIONS)
        if kind is SystemExit:
            assert caught.value.code == 128 + signal.SIGTERM
        # A call from Python resumes the run, without the images.
        said = capsys.readouterr().out
        assert said.endswith(f"go on with:\n  cpc_ext.fit(out_dir='{home / number.name}', resume=True)\n")
        assert fit(out_dir=home / number.name, resume=True).summary["steps"] == 8


def test_a_run_that_could_not_be_finished_says_the_call_that_goes_on(home, monkeypatch):
    def full(self):
        raise OSError("no room")

    monkeypatch.setattr(training.task_class("cpc-v1"), "evaluate", full)
    with pytest.raises(TrainingError) as caught:
        fit("cpc-v1", IMAGES, test=TEST, out_dir="run", **OPTIONS)
    assert str(caught.value).endswith(
        "checkpoint.pt holds step 8, from which cpc_ext.fit(out_dir='run', resume=True) goes on"
    )


def test_a_default_batch_gives_way_to_few_images(home):
    options = {"steps": 1, "warmup_steps": 0, "evaluate": False, "view_size": 16, "encoder": OPTIONS["encoder"]}
    fitted = fit("simclr", IMAGES, test=TEST, **options)
    assert yaml.safe_load((fitted.path / "config.yaml").read_text())["optimization"]["batch_size"] == 40
    with pytest.raises(TrainingError, match="--batch-size: expected at most 40 images, got 64"):
        fit("simclr", IMAGES, test=TEST, batch_size=64, **options)


def test_a_logger_alone_needs_no_tuple(home):
    for number, (given, wanted) in enumerate({"tensorboard": ["tensorboard"], (): []}.items()):
        fitted = fit("cpc-v1", IMAGES, test=TEST, out_dir=home / str(number), **OPTIONS | {"steps": 1}, logger=given)
        assert yaml.safe_load((fitted.path / "config.yaml").read_text())["output"]["logger"] == wanted


def test_a_thread_may_train(home):
    results = []
    options = OPTIONS | {"steps": 2}
    thread = threading.Thread(target=lambda: results.append(fit("cpc-v1", IMAGES, test=TEST, **options)))
    thread.start()
    thread.join()
    assert results[0].summary["steps"] == 2


def test_no_option_has_the_name_of_an_argument():
    names = {"model", "dataset", "test", "unlabeled", "classes", "workers", "out_dir", "resume", "config"}
    for model in MODELS:
        tree = preset(model, "textures" if model_medium(model) == "images" else "voices").model_dump()
        fields = {name for section in tree.values() if isinstance(section, dict) for name in section}
        assert fields & names == {"dataset"}
    assert not names & set(options_that_may_change())


def test_processes_wait_for_each_others_data_and_before_they_measure_steps(home, monkeypatch):
    """They read their data one after another, and have no patience with each other once they compute together."""
    done = []
    for place, name in ((training, "joined_ranks"), (training, "load_data"), (training, "of_known_length")):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, call=original, name=name: (done.append(name), call(*given))[1])
    monkeypatch.setattr(fit_module, "keep_dataset", lambda *given, **more: (done.append("keep"), home / "kept")[1])
    monkeypatch.setattr(training.Ranks, "wait", lambda self: done.append("wait"))
    np.savez(home / "kept.npz", **{part: images.images for part, images in TEXTURES.items()})
    (home / "kept").mkdir()
    (home / "kept.npz").rename(home / "kept" / "all.npz")
    options = {name: value for name, value in OPTIONS.items() if name not in ("steps", "checkpoint_every")}
    cpc_ext.fit("cpc-v1", IMAGES, test=TEST, time_budget=1e-6, evaluate=False, logger=(), **options)
    assert done == ["joined_ranks", "keep", "wait", "load_data", "wait", "of_known_length"]


def test_a_signal_before_the_steps_is_an_exit(monkeypatch):
    monkeypatch.setattr(training, "load_data", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        cpc_ext.fit("cpc-v1", IMAGES, test=TEST, **OPTIONS)
    assert ended.value.code == 128 + signal.SIGTERM
