"""The example loops, plain and with Lightning: their loss starts at chance and falls, and they write their files."""

from __future__ import annotations

import importlib
import math

import loop_cpc
import loop_cpc_audio
import loop_greedy_infomax
import loop_pixelcnn
import loop_simclr
import numpy as np
import pytest
import torch
from PIL import Image

from cpc_ext.models import CPC, GreedyInfoMax, MoCo, PixelCNNPP, SimCLR, SupCon

LIGHTNING = [
    ("lightning_cpc", "--images 12 --batch-size 4", CPC),
    ("lightning_greedy_infomax", "--images 12 --batch-size 4", GreedyInfoMax),
    ("lightning_simclr", "--images 24 --batch-size 8", SimCLR),
    ("lightning_simclr", "--images 24 --batch-size 8 --model moco", MoCo),
    ("lightning_simclr", "--images 24 --batch-size 8 --model supcon", SupCon),
    ("lightning_pixelcnn", "--images 12 --batch-size 4 --side 16 --model pixelcnn++", PixelCNNPP),
    ("lightning_cpc_audio", "--utterances 1 --batch-size 4", CPC),
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    """Run on one thread, as such small tensors are slower with more, and in a temporary folder."""
    before, generator = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning leaves it behind.
    yield
    torch.set_num_threads(before)
    torch.set_rng_state(generator)


def moved(encoder: torch.nn.Module, path) -> bool:
    """Return whether every weight in the file differs from the encoder's."""
    weights = torch.load(path, weights_only=True)
    state = encoder.state_dict()
    assert weights.keys() == state.keys()
    return all(not torch.equal(weights[name], value) for name, value in state.items() if value.ndim > 1)


@pytest.mark.parametrize("version", [1, 2])
def test_cpc(version, tmp_path, capsys):
    out = tmp_path / "encoder.pt"
    options = ["--version", str(version), "--images", "8", "--batch-size", "4", "--out", str(out)]
    losses = loop_cpc.main([*options, "--steps", "12"])
    assert len(losses) == 12
    # Targets are 2 to 4 rows below in 6 by 6 patches; or all in the batch.
    keys = [4 * 6 * rows for rows in (4, 3, 2)] if version == 1 else [4 * 36]
    guess = np.mean([math.log(number) for number in keys])
    assert losses[0] == pytest.approx(guess, rel=0.2)
    torch.manual_seed(0)
    assert moved(loop_cpc.make_model(version)[0].encoder, out)
    said = capsys.readouterr().out
    assert f"step 12: loss {losses[-1]:.3f}" in said
    assert "features of images, for a probe: [8, 128]" in said


def test_greedy_infomax(tmp_path, capsys):
    out = tmp_path / "encoder.pt"
    options = ["--images", "8", "--batch-size", "4", "--steps", "40", "--out", str(out)]
    losses = np.array(loop_greedy_infomax.main(options))
    assert losses.shape == (40, 3)
    assert losses[0] == pytest.approx([math.log(17)] * 3, rel=0.4)
    assert (losses[-5:].mean(0) < losses[:5].mean(0) - 0.2).all()  # All modules learn.
    assert moved(loop_greedy_infomax.make_model()[0].encoder, out)
    assert "[[8, 32], [8, 64], [8, 128]]" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["simclr", "supcon"])
def test_views_of_a_batch(model, tmp_path, capsys):
    out = tmp_path / "encoder.pt"
    options = ["--images", "16", "--batch-size", "8", "--steps", "40", "--lr", "3e-4", "--out", str(out)]
    losses = loop_simclr.main([*options, "--model", model])
    assert losses[0] == pytest.approx(math.log(15), rel=0.2)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    assert moved(loop_simclr.make_model(model)[0].encoder, out)
    assert "features of images, for a probe: [16, 128]" in capsys.readouterr().out


def test_moco(tmp_path):
    out = tmp_path / "encoder.pt"
    losses = loop_simclr.main(
        ["--model", "moco", "--images", "16", "--batch-size", "8", "--steps", "3", "--out", str(out)]
    )
    # The first keys are random, and not near any query, where its own is nearly the query: a score of 1 / 0.2.
    assert math.log(1024) - 1 / 0.2 < losses[0] < math.log(1024) - 0.5 / 0.2
    assert moved(loop_simclr.make_model("moco")[0].encoder, out)


@pytest.mark.parametrize("model", loop_pixelcnn.MODELS)
def test_pixelcnn(model, tmp_path):
    options = ["--model", model, "--images", "8", "--batch-size", "4", "--side", "16", "--steps", "15"]
    bits = loop_pixelcnn.main([*options, "--lr", "5e-3", "--samples", str(tmp_path / "samples.png")])
    assert len(bits) == 15
    assert bits[0] < 12  # 8 of guessing; PixelCNN++ does not know yet where values are.
    assert np.mean(bits[-3:]) < np.mean(bits[:3]) - 0.05
    with Image.open(tmp_path / "samples.png") as image:
        assert min(image.size) > 4 * 96  # Four by four of them, enlarged.


def test_cpc_audio(tmp_path, capsys):
    out = tmp_path / "model.pt"
    losses = loop_cpc_audio.main(["--utterances", "1", "--batch-size", "4", "--steps", "15", "--out", str(out)])
    assert losses[0] == pytest.approx(math.log(11), rel=0.1)
    assert np.mean(losses[-4:]) < losses[0]
    weights = torch.load(out, weights_only=True)
    model = loop_cpc_audio.make_model()
    model.load_state_dict(weights)
    assert "features of a recording, a row every 10 ms: [" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("name", "options", "kind"), LIGHTNING)
def test_with_lightning(name, options, kind, precision):
    pytest.importorskip("lightning", exc_type=ImportError)
    program = importlib.import_module(name)
    module = program.main([*options.split(), "--steps", "3", "--precision", precision])
    assert isinstance(module.model, kind)
    assert module.trainer.global_step == 3
    metrics = module.trainer.callback_metrics
    losses = [value.item() for metric, value in metrics.items() if metric.startswith(("loss", "bits"))]
    assert len(losses) == (3 if name == "lightning_greedy_infomax" else 1)
    assert all(0 < loss < 12 for loss in losses)
    # Each weight has been updated by Adam, which keeps a moment of each.
    trained = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
    state = module.trainer.optimizers[0].state
    assert all(state[parameter]["step"] == 3 for parameter in trained)


def example(kind, model):
    """The program, "loop" or "lightning", of a model."""
    if kind == "lightning":
        pytest.importorskip("lightning", exc_type=ImportError)
    return importlib.import_module(f"{kind}_{model}")


@pytest.mark.parametrize("kind", ["loop", "lightning"])
@pytest.mark.parametrize("model", ["cpc", "greedy_infomax", "simclr", "pixelcnn"])
def test_fewer_images_than_a_batch(kind, model, capsys):
    program = example(kind, model)
    with pytest.raises(SystemExit):
        program.main(["--images", "3", "--batch-size", "4"])
    assert "--images: fewer than a batch" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["loop", "lightning"])
def test_sides_that_pixelcnnpp_cannot_halve_twice(kind, capsys):
    program = example(kind, "pixelcnn")
    with pytest.raises(SystemExit):
        program.main(["--model", "pixelcnn++", "--side", "30"])
    assert "--side: a multiple of 4 for pixelcnn++" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["loop", "lightning"])
def test_voices_are_no_more_than_a_loop_needs(kind, monkeypatch):
    program = example(kind, "cpc_audio")
    drawn = []
    make_voices = program.make_voices
    monkeypatch.setattr(program, "make_voices", lambda count: drawn.append(count) or make_voices(1))
    program.main(["--batch-size", "4", "--steps", "1"])
    assert drawn == [11]


def test_keys_follow_in_lightning():
    lightning = pytest.importorskip("lightning", exc_type=ImportError)
    program = importlib.import_module("lightning_simclr")
    model = program.main(["--images", "8", "--batch-size", "4", "--model", "moco", "--steps", "2"]).model
    lightning.seed_everything(0)
    before, _ = loop_simclr.make_model("moco")
    weights = zip(model.key_encoder.parameters(), before.key_encoder.parameters(), strict=True)
    assert all(not torch.equal(after, first) for after, first in weights if first.ndim > 1)
