"""Files and numbers of the wrong type, size or shape: each is a clear error, not a traceback or a silent use."""

from __future__ import annotations

import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from cpc_ext.data.images.published.stl10 import _folds
from cpc_ext.data_sets import DATASETS, medium
from cpc_ext.evaluation.encodings_cache import cached_encodings
from cpc_ext.interop import CheckpointError, load_reference
from cpc_ext.programs import sample
from cpc_ext.programs.train_options import parse
from cpc_ext.training.config import load_config
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import default_dataset, preset
from cpc_ext.training.registry import MODELS, model_medium

# ---- config.yaml ----

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe not text", "is not a YAML file of options: 'utf-8' codec"),
        (b"a: [", "is not a YAML file of options"),
        (b"[" * 100_000, "is not a YAML file of options"),
        (b"{a: " * 5_000, "is not a YAML file of options"),
        (LAUGHS.encode(), r"it refers to another place by \*a"),
        (b"model: &m cpc-v1\ndata: &d {dataset: *m, more: *d}", r"it refers to another place by \*m"),
        (b"a: &a [*a]", r"it refers to another place by \*a"),
        (b"x: 1\n" * 300_000, "it has more than 1048576 bytes"),
        (b"model: cpc-v1\nmodel: cpc-v2\n", "it has model twice"),
        (b"data: {dataset: textures, dataset: stl10}", "it has dataset twice"),
        (b"a: " + b"9" * 5000, "is not a YAML file of options|Exceeds the limit"),
        (b"a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        (b"a\x00b: 1", "is not a YAML file of options"),
        (b"", "does not hold a run's options"),
        (b"[1, 2]", "does not hold a run's options"),
        (b"17", "does not hold a run's options"),
        (b"1: 2\noptimization: {steps: 1}", "it has 1 as a name"),
        (b"optimization: {steps: 1, null: 2}", "it has None as a name"),
        (b"optimization: {steps: 1}\nanything: 2", "anything: there is no such option"),
        (b"{[1]: 2}", "is not a YAML file of options"),
        (b"model: [cpc-v1]\noptimization: {steps: 1}", "--model: "),
        (b"model: cpc-v1\noptimization: 3", "--optimization: "),
        (b"optimization: {steps: 1}\ncpc: {norm: {}}", "--norm: "),
        (b"optimization: {steps: 1}\ndata: {dataset: 2020-01-01}", "--dataset: "),
        (b"optimization: {steps: -5}", "--steps: input should be greater than or equal to 1, got -5"),
        (b"optimization: {steps: .inf}", "--steps: "),
        (b"optimization: {steps: 1, batch_size: [" + b"9, " * 900 + b"]}", r"--batch-size: .*\.\.\."),
    ],
)
def test_config_files(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value)) < 2000
    with pytest.raises(TrainingError):
        parse(["--config", str(path)])


def test_a_folder_and_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TrainingError, match="--config: cannot read"):
            load_config(path)


@pytest.mark.parametrize(
    ("model", "dataset"),
    [(model, dataset) for model in MODELS for dataset in DATASETS if medium(dataset) == model_medium(model)],
)
def test_what_a_run_writes_is_read(tmp_path, model, dataset):
    config = preset(model, dataset, device="cpu")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


# ---- Numbers on the command line ----


def _numbers():
    """Yield every numeric option, with a model that has it."""
    found = {}
    for model in ("cpc-v1", "cpc-v2", "simclr", "pixelcnn++", "greedy-infomax", "cpc-audio", "greedy-infomax-audio"):
        tree = preset(model, default_dataset(model), device="cpu").model_dump()
        for section in tree.values():
            for name, value in section.items() if isinstance(section, dict) else ():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault("--" + name.replace("_", "-"), model)
    return sorted(found.items())


# Counts without an upper limit; the batch size is compared with the number of images later.
COUNTS = (
    *("--steps", "--batch-size", "--log-every", "--checkpoint-every", "--warmup-steps", "--sample-every"),
    *("--cache-views", "--clip-grad", "--probe-images"),
)


@pytest.mark.parametrize(("option", "model"), _numbers())
def test_numbers_out_of_range(capsys, option, model):
    for value in ("nan", "inf", "-inf", "-1", "x", "9" * 30):
        if option in COUNTS and value[0] == "9":
            continue
        with pytest.raises(SystemExit) as caught:
            parse(["--model", model, "--device", "cpu", f"{option}={value}"])
        assert caught.value.code == 2, value
        assert option in capsys.readouterr().err, value


# ---- Tensors, arrays and lists ----


def hostile(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        hostile({}),
        struct.pack("<Q", 2**62) + b"{}",
        hostile({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        hostile({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        hostile({"__metadata__": {"description": "[" * 100_000}}),
        hostile({"__metadata__": {"description": "[1]"}}),
        hostile({"__metadata__": {"description": json.dumps({"model": "PixelCNN", "arguments": 3})}}),
        hostile({"__metadata__": {"description": json.dumps({"model": [], "arguments": {}})}}),
        hostile(b"[" * 5000),
    ],
)
def test_files_of_tensors(tmp_path, capsys, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(preset("pixelcnn", "textures", device="cpu").to_yaml())
    (run / "model.safetensors").write_bytes(content)
    assert sample.main([str(run), "--device", "cpu"]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        load_reference(run / "model.safetensors", "cpcv2-pytorch")
    # The damaged cache is computed again.
    kept = cached_encodings(run / "model.safetensors", {"a": "b"}, 3, lambda: torch.ones(3, 2))
    assert torch.equal(kept, torch.ones(3, 2))


@pytest.mark.parametrize("features", [torch.ones(3, 2, dtype=torch.int64), torch.ones(3), torch.ones(2, 2)])
def test_kept_encodings_of_another_type_or_shape(tmp_path, features):
    path = tmp_path / "features.safetensors"
    save_file({"features": features}, path, {"origin": json.dumps({"a": "b"})})
    assert torch.equal(cached_encodings(path, {"a": "b"}, 3, lambda: torch.zeros(3, 2)), torch.zeros(3, 2))


def test_a_checkpoint_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    with pytest.raises(CheckpointError, match="would expand to 67,108,864 bytes"):
        load_reference(path, "cpcv2-pytorch")


@pytest.mark.parametrize(
    "content", [b"1 2 x\n", b"1.5\n", b"9" * 30 + b"\n", b"\xff\xff", b"", b"-1 " * 1000, b"1 2\n" * 10]
)
def test_fold_files(tmp_path, content):
    (tmp_path / "fold_indices.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"fold_indices\.txt|utf-8"):
        _folds(tmp_path / "fold_indices.txt")


@pytest.mark.parametrize("option", [("--seed", str(2**70)), ("--seed", "-1"), ("--temperature", "nan"), ("--n", "0")])
def test_numbers_of_sample(tmp_path, capsys, option):
    assert sample.main([str(tmp_path), "--device", "cpu", *option]) == 1
    assert f"error: {option[0]}: " in capsys.readouterr().err
