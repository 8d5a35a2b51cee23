"""Fine-tuning by itself: how often each image is seen, the initial features and classifier, and the updates."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from cpc_ext.data import ImageSet
from cpc_ext.evaluation.finetuning import FineTuning, fine_tune
from cpc_ext.tasks.greedy_infomax.task import GreedyTask
from tests.tasks.test_every_option import config_of, dataset_of, noise

CPU = torch.device("cpu")
COUNT = 40


class Scaled(nn.Module):
    """Encodings of an image: its first pixel and the square of it, times a weight."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), weight))


class Eyes:
    """Stub of a task that records the images it encodes, separately with and without a generator for crops."""

    def __init__(self) -> None:
        self.trained: list[list[int]] = []
        self.looked: list[list[int]] = []
        self.modes: list[bool] = []
        self.crops: list[float] = []
        self.autocast: list[bool] = []

    def encode(self, model, images, generator=None):
        (self.looked if generator is None else self.trained).append(images.flatten().tolist())
        self.modes.append(model.training)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        if generator is not None:
            self.crops.append(torch.rand(1, generator=generator).item())
        pixel = images.flatten(1).float()
        return (torch.cat([pixel, pixel**2], dim=1) * model.weight)[:, :, None, None].expand(-1, -1, 2, 2)

    def thaw(self, model):
        pass

    def features(self, model, images):
        return self.encode(model, images).mean((2, 3))


class Whole(Eyes):
    """Stub of a task whose encoder is the model itself."""

    def encode(self, model, images, generator=None):
        return model(images.float())


def pixels(values) -> np.ndarray:
    return np.asarray(values, dtype=np.uint8)[:, None, None, None]


IMAGES = ImageSet(pixels(range(COUNT)), np.arange(COUNT, dtype=np.int64) // 20)
TEST = ImageSet(pixels([3, 33, 200]))


def tune(
    task, model, *, chosen=None, steps=None, epochs=1, least=1, encoder_lr=0.1, head_lr=0.1, precision="fp32", seed=0
):
    """Fine-tune a task. steps: number of updates to make; all by default."""
    return fine_tune(
        task,
        model,
        IMAGES,
        np.arange(COUNT) if chosen is None else np.asarray(chosen),
        TEST,
        FineTuning(epochs=epochs, min_steps=least, encoder_lr=encoder_lr, head_lr=head_lr),
        classes=2,
        precision=precision,
        seed=seed,
        progress=lambda numbers: list(numbers)[:steps],
    )


def test_passes_over_the_chosen_images_alone():
    task = Eyes()
    tune(task, Scaled(), epochs=3)
    assert [len(batch) for batch in task.trained] == [32, 8] * 3
    for start in range(0, 6, 2):
        assert sorted(task.trained[start] + task.trained[start + 1]) == list(range(COUNT))
    few = Eyes()
    tune(few, Scaled(), chosen=[5, 25, 26], least=4)
    assert [sorted(batch) for batch in few.trained] == [[5, 25, 26]] * 4
    # The statistics of features come from the same images; after that come the test images.
    assert few.looked == [[5, 25, 26], [3, 33, 200]]
    assert task.trained[:2] != task.trained[2:4]


def test_no_batch_is_of_one_image():
    """Batch norm would have nothing to take a deviation of: an epoch's last batch gets one of the batch before."""
    task = Eyes()
    tune(task, Scaled(), chosen=range(33), epochs=2)
    assert [len(batch) for batch in task.trained] == [31, 2] * 2
    for start in (0, 2):
        assert sorted(task.trained[start] + task.trained[start + 1]) == list(range(33))
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    tune(Whole(), model, chosen=range(33), epochs=1)
    assert model[1].num_batches_tracked == 1 + 2  # What features are like is told by one.


def test_the_seed_determines_order_and_crops():
    first, again, other = Eyes(), Eyes(), Eyes()
    for task, seed in ((first, 1), (again, 1), (other, 2)):
        tune(task, Scaled(), seed=seed)
    assert (first.trained, first.crops) == (again.trained, again.crops)
    assert first.trained != other.trained
    assert first.crops[0] != other.crops[0]


def test_the_classifier_starts_at_zero_and_the_model_is_judged_in_evaluation_mode():
    task = Eyes()
    logits = tune(task, Scaled().train(), steps=0)
    assert torch.equal(logits, torch.zeros(3, 2))
    assert logits.dtype == torch.float32
    tune(task, Scaled())
    assert task.modes[-1] is False
    assert task.modes[-2] is True


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_first_update_of_the_classifier(scale):
    """Adam's is the learning rate, of which a warm-up of 10 updates gives a tenth; features are standardised."""
    rate = 0.5 / 10
    model = Scaled(scale)
    logits = tune(Eyes(), model, chosen=range(30), least=100, steps=1, encoder_lr=0.0, head_lr=0.5)
    train, test = (np.stack([x, x**2], axis=1) for x in (np.arange(30.0), np.array([3.0, 33.0, 200.0])))
    standardised = torch.from_numpy((test - train.mean(0)) / train.std(0, ddof=1)).float()
    # Class 1 has the larger pixels, and a third of the images.
    torch.testing.assert_close(logits[:, 1], rate * standardised.sum(1) - rate, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits[:, 0], -logits[:, 1])


def test_features_that_never_vary_carry_nothing():
    """They are zero, and the offset alone is learnt."""
    logits = tune(Eyes(), Scaled(0.0), chosen=range(30), least=100, steps=1, encoder_lr=0.0, head_lr=0.5)
    torch.testing.assert_close(logits, torch.tensor([0.05, -0.05]).expand(3, 2))


def test_the_encoder_stays_where_its_learning_rate_is_zero():
    model = Scaled()
    tune(Eyes(), model, least=20, encoder_lr=0.0, head_lr=0.5)
    assert model.weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_cut_to_norm_one_together(precision):
    """After those of fp16, which are scaled so that they do not vanish, are as they were."""
    task, model = Eyes(), Scaled()
    tune(task, model, least=100, steps=5, encoder_lr=0.0, head_lr=50.0, precision=precision)
    assert 0.5 < model.weight.grad.norm() <= 1 + 1e-5


def test_weights_of_the_encoder_decay_with_its_learning_rate():
    """The classifier is zero at first, so the encoder has no gradient in the first update."""
    task, model = Eyes(), Scaled()
    tune(task, model, least=10, steps=1, encoder_lr=0.5)
    assert model.weight.tolist() == pytest.approx([1 - 0.5 * 1e-4] * 2, rel=1e-7)


def test_modules_that_a_run_keeps_frozen_learn_as_well():
    """Else a supervised encoder would stand on modules that nobody has trained."""
    dataset = dataset_of(noise(12))
    config = config_of("greedy-infomax", modules=3, train_module=1, resume_from="run", precision="fp32")
    task = GreedyTask(config, dataset, CPU)
    model = copy.deepcopy(task.model)
    recipe = FineTuning(epochs=1, min_steps=1, encoder_lr=0.1, head_lr=0.1)
    rest = {"classes": 2, "precision": "fp32", "seed": 0, "progress": iter}
    fine_tune(task, model, dataset.train, np.arange(4), dataset.test, recipe, **rest)
    modules = zip(model.encoder_modules, task.model.encoder_modules, strict=True)
    moved = [
        any(not torch.equal(*pair) for pair in zip(after.parameters(), before.parameters(), strict=True))
        for after, before in modules
    ]
    assert moved == [True, True, False]  # The last is not run, as the run has not trained it.
    assert task.model.frozen == 1


def test_learning_ends_near_zero():
    """The cosine of the last update: half a percent of the peak after 20 updates, of which two are the warm-up."""
    task, model = Eyes(), Scaled()
    tune(task, model, least=20, steps=19, encoder_lr=0.1)
    before = model.weight.detach().clone()
    again = Scaled()
    tune(Eyes(), again, least=20, encoder_lr=0.1)
    last = 0.1 * 0.5 * (1 + math.cos(math.pi * 17 / 18))
    assert 0 < (again.weight - before).abs().max() <= 3 * last


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_that_of_the_encoder(precision, monkeypatch):
    task, scaled, original = Eyes(), [], torch.amp.GradScaler.scale
    monkeypatch.setattr(
        torch.amp.GradScaler, "scale", lambda scaler, loss: scaled.append(scaler.is_enabled()) or original(scaler, loss)
    )
    tune(task, Scaled(), precision=precision)
    assert task.autocast[1] == (precision != "fp32")
    assert scaled == [precision == "fp16"] * 2


def test_classes_are_learnt():
    logits = tune(Eyes(), Scaled(), least=60)
    assert logits[:2].argmax(1).tolist() == [0, 1]
