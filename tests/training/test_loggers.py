"""Loggers: the content of TensorBoard's files, calls of W&B and MLflow, and runs that continue if a logger fails.

Recorders of calls replace the latter two libraries; if these are installed, they write their real files as well.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cpc_ext.programs.train_options import describe, parse
from cpc_ext.tasks.pixelcnn.task import TASK as PixelCNNTask
from cpc_ext.training import loggers
from cpc_ext.training.config import LOGGERS
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.loggers import check_loggers, open_logger
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog, read_metrics, write_table
from tests.tasks.test_every_option import config_of
from tests.training.conftest import SHORT

PIXELS = (*SHORT, "--model", "pixelcnn", "--layers", "1", "--hidden-channels", "6", "--sample-every", "3")


def picture(path: Path, color: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), color, np.uint8)).save(path)
    return path


def one_run(folder: Path, *names: str, after_step: int = 0, complete: bool = True) -> None:
    """Write a run's log: config, two steps after the given one, an evaluation, figures and results."""
    run = RunDir(folder)
    log = RunLog(run, after_step=after_step, loggers=names)
    log.config(config_of("cpc-v1", seed=5))
    log.log({"step": after_step + 1, "epoch": 0.5, "loss": 2.0, "lr": 0.5})
    log.log({"step": after_step + 2, "epoch": 1.0, "loss": 1.0, "lr": 0.25})
    log.log({"step": after_step + 2, "knn_accuracy": 0.75}, group="observed")
    log.images(after_step + 2, [picture(run.sample(after_step + 2), 10), picture(folder / "curves.png", 200)])
    log.sync()
    if complete:
        log.scalars(after_step + 2, {"probe_accuracy": 0.5})
    log.close()


# TensorBoard.


def test_what_tensorboard_holds(tmp_path):
    one_run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "train/loss": [(1, 2.0), (2, 1.0)],
        "train/lr": [(1, 0.5), (2, 0.25)],
        "observed/knn_accuracy": [(2, 0.75)],
        "final/probe_accuracy": [(2, 0.5)],
    }
    assert set(events.Tags()["images"]) == {"figures/curves", "samples/on_the_way"}
    for tag, color in (("figures/curves", 200), ("samples/on_the_way", 10)):
        (image,) = events.Images(tag)
        (tmp_path / "shown.png").write_bytes(image.encoded_image_string)
        assert (image.step, image.width, image.height) == (2, 6, 4)
        assert np.unique(Image.open(tmp_path / "shown.png")).tolist() == [color]
    (text,) = events.Tensors("config/text_summary")
    # Four spaces more than in YAML: Markdown leaves such lines as they are.
    assert "      seed: 5" in text.tensor_proto.string_val[0].decode().splitlines()


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    one_run(tmp_path, "tensorboard")
    one_run(tmp_path, "tensorboard", after_step=1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 2.0), (2, 2.0), (3, 1.0)]


# The others, played.


class Recorder:
    """Stub of any object: records calls, and returns the answer given for their name, or another recorder."""

    def __init__(self, notes: list[tuple[str, tuple[Any, ...], dict[str, Any]]], name: str, answers: dict[str, Any]):
        self._notes, self._name, self._answers = notes, name, answers

    def __getattr__(self, name: str) -> Recorder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(self._notes, f"{self._name}.{name}".lstrip("."), self._answers)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._notes.append((self._name, arguments, options))
        answer = self._answers.get(self._name, Recorder(self._notes, self._name, self._answers))
        return answer(*arguments, **options) if callable(answer) and not isinstance(answer, Recorder) else answer


@pytest.fixture
def played(monkeypatch):
    """A function: played(library, answers) replaces a library, and returns its calls: name, arguments, options."""

    def play(library: str, answers: dict[str, Any]) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        notes: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        recorder = Recorder(notes, "", answers)
        real = loggers.import_module
        monkeypatch.setattr(loggers, "import_module", lambda name: recorder if name == library else real(name))
        for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        return notes

    return play


def test_what_wandb_is_told(tmp_path, played, monkeypatch):
    calls = played("wandb", {"Settings": lambda **options: options, "Image": lambda path: f"image {Path(path).name}"})
    run = tmp_path / "mine"
    run.mkdir()
    one_run(run, "wandb")
    (_, _, begun), *_ = [call for call in calls if call[0] == "init"]
    assert (begun["project"], begun["name"], begun["dir"], begun["mode"]) == ("cpc_ext", "mine", str(run), "offline")
    assert "resume" not in begun
    logged = [(arguments[0], options["step"]) for name, arguments, options in calls if name == "init.log"]
    assert logged == [
        ({"train/loss": 2.0, "train/lr": 0.5}, 1),
        ({"train/loss": 1.0, "train/lr": 0.25}, 2),
        ({"observed/knn_accuracy": 0.75}, 2),
        ({"samples/on_the_way": "image step-000002.png"}, 2),
        ({"figures/curves": "image curves.png"}, 2),
        ({"final/probe_accuracy": 0.5}, 2),
    ]
    (config,) = [arguments[0] for name, arguments, _ in calls if name == "init.config.update"]
    assert config["compute"]["seed"] == 5
    assert calls[-1] == ("init.finish", (), {"exit_code": 0})

    # The run goes on as the same one; another is another.
    calls.clear()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    one_run(run, "wandb", after_step=2, complete=False)
    (_, _, again), *_ = [call for call in calls if call[0] == "init"]
    assert again["id"] == begun["id"]
    assert (again["mode"], again["resume"], again["project"]) == ("online", "allow", "theirs")
    assert calls[-1] == ("init.finish", (), {"exit_code": 1})
    one_run(run, "wandb")
    assert [options["id"] for name, _, options in calls if name == "init"][-1] != begun["id"]


def test_what_mlflow_is_told(tmp_path, played, monkeypatch):
    made = types.SimpleNamespace(info=types.SimpleNamespace(run_id="run 7"))
    answers = {
        "MlflowClient.get_experiment_by_name": None,
        "MlflowClient.create_experiment": "experiment 3",
        "MlflowClient.create_run": made,
        "entities.Metric": lambda name, value, when, step: (name, value, step),
        "entities.Param": lambda name, value: (name, value),
    }
    calls = played("mlflow", answers)
    run = tmp_path / "mine"
    run.mkdir()
    one_run(run, "mlflow")
    of = {name: [(arguments, options) for each, arguments, options in calls if each == name] for name, *_ in calls}
    assert of["MlflowClient"] == [((), {"tracking_uri": f"sqlite:///{run / 'mlflow' / 'mlflow.db'}"})]
    assert of["MlflowClient.create_experiment"] == [
        (("cpc_ext",), {"artifact_location": (run / "mlflow" / "artifacts").as_uri()})
    ]
    assert of["MlflowClient.create_run"] == [(("experiment 3",), {"run_name": "mine"})]
    batches = of["MlflowClient.log_batch"]
    assert {arguments for arguments, _ in batches} == {("run 7",)}
    assert ("compute.seed", "5") in batches[0][1]["params"]
    assert ("model", '"cpc-v1"') in batches[0][1]["params"]
    assert [options["metrics"] for _, options in batches[1:]] == [
        [("train/loss", 2.0, 1), ("train/lr", 0.5, 1)],
        [("train/loss", 1.0, 2), ("train/lr", 0.25, 2)],
        [("observed/knn_accuracy", 0.75, 2)],
        [("final/probe_accuracy", 0.5, 2)],
    ]
    (((name, text, file), _),) = of["MlflowClient.log_text"]
    assert (name, file, "seed: 5" in text) == ("run 7", "config.yaml", True)
    assert [arguments[1:] for arguments, _ in of["MlflowClient.log_artifact"]] == [
        (str(run / "samples" / "step-000002.png"), "samples"),
        (str(run / "curves.png"), "figures"),
    ]
    assert calls[-1] == ("MlflowClient.set_terminated", ("run 7", "FINISHED"), {})

    calls.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    one_run(run, "mlflow", after_step=2, complete=False)
    names = [name for name, *_ in calls]
    assert calls[0] == ("MlflowClient", (), {"tracking_uri": "http://there"})
    assert ("MlflowClient.update_run", ("run 7",), {"status": "RUNNING"}) in calls
    assert "MlflowClient.create_run" not in names
    # Parameters that have a value cannot have another.
    assert not any("params" in options for _, _, options in calls)
    assert calls[-1] == ("MlflowClient.set_terminated", ("run 7", "KILLED"), {})


def test_an_experiment_that_is_there_is_taken(tmp_path, played):
    found = types.SimpleNamespace(experiment_id="9")
    made = types.SimpleNamespace(info=types.SimpleNamespace(run_id="run 7"))
    answers = {"MlflowClient.get_experiment_by_name": found, "MlflowClient.create_run": made}
    calls = played("mlflow", answers)
    open_logger("mlflow", RunDir(tmp_path), after_step=0)
    assert [arguments for name, arguments, _ in calls if name == "MlflowClient.create_run"] == [("9",)]


# The others, where they are installed.


def test_mlflow_itself(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    one_run(tmp_path, "mlflow", complete=False)
    one_run(tmp_path, "mlflow", after_step=2)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    (experiment,) = (each for each in client.search_experiments() if each.name == "cpc_ext")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((each.step, each.value) for each in history) == [(1, 2.0), (2, 1.0), (3, 2.0), (4, 1.0)]
    assert run.data.params["compute.seed"] == "5"
    assert run.info.status == "FINISHED"
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"config.yaml", "figures", "samples"}


def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    one_run(tmp_path, "wandb", complete=False)
    one_run(tmp_path, "wandb", after_step=2)
    identity = (tmp_path / "wandb" / "run-id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))) == 2


# Missing and failing loggers.


@pytest.mark.parametrize("name", LOGGERS)
def test_a_library_that_is_missing(name, monkeypatch):
    def missing(library: str) -> Any:
        raise ModuleNotFoundError(f"No module named {library!r}")

    monkeypatch.setattr(loggers, "import_module", missing)
    package = {"tensorboard": "tensorboard"}.get(name, f"'cpc_ext[{name}]'")
    with pytest.raises(TrainingError, match=f"--logger {name} needs a library .*: pip install ") as caught:
        check_loggers([name])
    assert str(caught.value).endswith(f"pip install {package}")
    assert "\n" not in str(caught.value)


def test_a_library_beside_the_one_that_is_missing(monkeypatch):
    """As with mlflow-skinny alone."""
    real = {"mlflow": types.ModuleType("mlflow")}

    def some(library: str) -> Any:
        if library not in real:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return real[library]

    monkeypatch.setattr(loggers, "import_module", some)
    with pytest.raises(TrainingError, match=r"'sqlalchemy'.*'cpc_ext\[mlflow\]'"):
        check_loggers(["mlflow"])


def test_a_library_that_is_broken(monkeypatch):
    def broken(library: str) -> Any:
        raise RuntimeError("protobuf is too new")

    monkeypatch.setattr(loggers, "import_module", broken)
    with pytest.raises(TrainingError, match="wandb is installed but cannot be imported: RuntimeError: protobuf is"):
        check_loggers(["wandb"])


def test_a_run_is_refused_before_it_begins(train_with, tmp_path, monkeypatch, capsys):
    real = importlib.import_module

    def without(library: str) -> Any:
        if library == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real(library)

    monkeypatch.setattr(loggers, "import_module", without)
    assert train_with(*PIXELS, "--out-dir", tmp_path / "run", "--logger", "wandb") == 1
    error = capsys.readouterr().err
    assert "error: --logger wandb needs a library that is not installed" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["__init__", "config", "scalars", "image", "flush", "close"])
def test_the_log_goes_on_without_one_that_fails(when, tmp_path, monkeypatch, capsys):
    told: list[str] = []

    class Failing(loggers.Logger):
        library, package, title = "none", "none", "to nowhere"

        def __init__(self, run, *, after_step):
            self._do("__init__")

        def _do(self, name):
            told.append(name)
            if name == when:
                raise ConnectionError("nobody there")

        def config(self, config):
            self._do("config")

        def scalars(self, step, values):
            self._do("scalars")

        def image(self, step, name, path):
            self._do("image")

        def flush(self):
            self._do("flush")

        def close(self, *, complete):
            self._do("close")

    monkeypatch.setitem(loggers._KINDS, "failing", Failing)
    one_run(tmp_path, "failing", "tensorboard")
    assert told.count(when) == 1
    assert told[-1] == when  # It is told no more.
    assert capsys.readouterr().err.count("could not write to nowhere (nobody there); training goes on without") == 1
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2]
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("final/probe_accuracy")


# The command line.


def test_loggers_by_name():
    assert tuple(loggers._KINDS) == LOGGERS
    assert parse([]).run.output.logger == ("tensorboard",)
    for given in (
        ["--logger", "wandb", "mlflow"],
        ["--logger", "wandb", "--logger", "mlflow"],
        ["--logger=wandb", "--steps", "3", "--logger=mlflow", "--seed", "2", "--logger", "wandb"],
    ):
        assert parse(given).run.output.logger == ("wandb", "mlflow")
    none = parse(["--logger", "--steps", "5"]).run
    assert (none.output.logger, none.optimization.steps) == ((), 5)
    shown = next(line for line in describe(none).splitlines() if "output" in line)
    assert shown.endswith("--logger")


def test_a_logger_that_nobody_knows(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--logger", "wandb", "--logger", "paper"])
    assert caught.value.code == 2
    assert "paper" in capsys.readouterr().err


# The table.


def test_a_row_a_step_and_a_column_a_name(tmp_path):
    path = tmp_path / "metrics.csv"
    write_table(
        [
            {"step": 0, "knn": 0.1},
            {"step": 2, "loss": 1.5, "lr": 1e-05},
            {"step": 2, "knn": 0.25},
            {"step": 3, "loss": 1},
        ],
        path,
    )
    assert path.read_text() == "step,knn,loss,lr\n0,0.1,,\n2,0.25,1.5,1e-05\n3,,1,\n"
    write_table([], path)
    assert path.read_text() == "step\n"


def test_the_table_of_a_run_that_went_on_has_all_steps(train_with, tmp_path, monkeypatch):
    """Also where nothing else is logged to, and with what is seen on the way."""
    monkeypatch.setattr(PixelCNNTask, "save", lambda task, run: None)
    monkeypatch.setattr(PixelCNNTask, "evaluate", lambda task: {})
    options = (*PIXELS, "--schedule", "constant", "--out-dir", tmp_path, "--logger")
    assert train_with(*options, "--steps", "5") == 0
    assert train_with("--resume", "--out-dir", tmp_path, "--steps", "8") == 0
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 5, 6, 8]
    records: dict[int, dict[str, Any]] = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["step"], {}).update(record)
    for row in rows:
        assert {name: float(value) for name, value in row.items() if value} == records[int(row["step"])]
        assert row["heldout_bits_per_dim"]
    assert not (tmp_path / "tensorboard").exists()


def test_a_table_that_cannot_be_written(tmp_path, capsys):
    run = RunDir(tmp_path)
    run.table.mkdir()
    log = RunLog(run, loggers=())
    log.log({"step": 1, "loss": 0.5})
    log.close()
    assert "could not write metrics.csv" in capsys.readouterr().err
    assert len(read_metrics(run.metrics)) == 1


def test_a_run_shows_its_samples_and_figures(train_with, tmp_path):
    assert train_with(*PIXELS, "--out-dir", tmp_path) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [each.step for each in events.Images("samples/on_the_way")] == [3, 6, 8]
    assert {tag for tag in events.Tags()["images"] if tag.startswith("figures/")} == {
        "figures/curves",
        "figures/samples",
    }
    assert events.Scalars("observed/heldout_bits_per_dim")
    assert "config/text_summary" in events.Tags()["tensors"]


def test_nothing_is_imported_for_loggers_that_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "import_module", lambda name: pytest.fail(name))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    log = RunLog(RunDir(tmp_path), loggers=())
    log.close()
