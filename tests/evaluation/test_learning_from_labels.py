"""Learning from labels in evaluation: accuracies, drawn label subsets, and the effect of each fine-tuning setting."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cpc_ext.data import ImageSet
from cpc_ext.evaluation import finetuning
from cpc_ext.evaluation.evaluator import _Evaluator, judged
from cpc_ext.evaluation.finetuning import FineTuning, fine_tune
from cpc_ext.evaluation.options import EvaluationOptions
from cpc_ext.measures.label_subsets import LabelBudget
from cpc_ext.training.errors import TrainingError

# ---- Accuracies ----


def test_top1_top5_and_confusion():
    scores = torch.full((4, 7), -1.0)
    # The true class is named first, third, fifth, sixth.
    labels = torch.tensor([2, 2, 0, 6])
    scores[0, 2] = 9
    scores[1, [4, 5, 2]] = torch.tensor([3.0, 2, 1])
    scores[2, [1, 2, 3, 4, 0]] = torch.tensor([5.0, 4, 3, 2, 1])
    scores[3, [1, 2, 3, 4, 5, 6]] = torch.tensor([6.0, 5, 4, 3, 2, 1])
    top1, top5, confusion = judged(scores, labels)
    assert (top1, top5) == (0.25, 0.75)
    expected = torch.zeros(7, 7, dtype=torch.int64)
    for true, named in ((2, 2), (2, 4), (0, 1), (6, 1)):
        expected[true, named] += 1
    assert torch.equal(confusion, expected)


def test_few_classes_have_no_top5():
    assert judged(torch.eye(3), torch.tensor([0, 1, 0]))[:2] == (2 / 3, 1.0)


# ---- Which labels ----


@pytest.mark.parametrize(
    ("share", "sizes", "expected"),
    [
        (0.1, (16, 25, 14), (2, 2, 1)),
        (0.5, (3, 7, 9), (2, 4, 4)),
        (0.26, (10, 11, 13), (3, 3, 3)),
        (1.0, (3, 4), (3, 4)),
    ],
)
def test_a_share_is_rounded_to_the_nearest_number(share, sizes, expected):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    chosen = LabelBudget(share=share).subset(labels, [str(size) for size in sizes], seed=0, draw=0)
    assert tuple(np.bincount(labels[chosen])) == expected


def test_every_class_is_drawn_on_its_own():
    labels = np.repeat(np.arange(8), 50)
    for budget in (LabelBudget(per_class=5), LabelBudget(share=0.1)):
        chosen = budget.subset(labels, "abcdefgh", seed=3, draw=1)
        places = {tuple(chosen[labels[chosen] == label] - 50 * label) for label in range(8)}
        assert len(places) == 8


def test_classes_without_images_are_passed_over():
    """Such as the first of EMNIST's letters as torchvision has them."""
    labels = np.array([1] * 5 + [3] * 4)
    assert LabelBudget(per_class=4).subset(labels, "abcd", seed=0, draw=0).shape == (8,)
    assert LabelBudget(share=1.0).subset(labels, "abcd", seed=0, draw=0).tolist() == list(range(9))
    with pytest.raises(TrainingError, match="--labels 5: class d has 4 labelled training images"):
        LabelBudget(per_class=5).subset(labels, "abcd", seed=0, draw=0)


def test_what_another_class_has_changes_nothing():
    few, many = np.array([0] * 20 + [1] * 30), np.array([0] * 20 + [1] * 300)
    draws = [LabelBudget(per_class=4).subset(labels, "ab", seed=0, draw=0) for labels in (few, many)]
    assert np.array_equal(draws[0][:4], draws[1][:4])


# ---- Fine-tuning ----


class Task:
    """Stub of a task with one weight for each feature, which records the batches it encodes."""

    def __init__(self):
        self.batches = []

    def encode(self, model, images, generator=None):
        if generator is not None:
            self.batches.append((len(images), generator.initial_seed()))
        return model(images.float().mean((2, 3)))[..., None, None]

    def thaw(self, model):
        pass

    def features(self, model, images):
        return self.encode(model, images)[:, :, 0, 0].detach()


@pytest.fixture
def tuned(monkeypatch):
    """A function: tuned(recipe, images) fine-tunes, and returns the learning rates of each step and the optimizer."""

    def tune(recipe, count=40, seed=0):
        rates, norms, made = [], [], []

        class Optimizer(torch.optim.AdamW):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                made.append(self)

            def step(self, *arguments):
                rates.append([group["lr"] for group in self.param_groups])
                gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
                norms.append(torch.cat(gradients).norm().item())
                return super().step(*arguments)

        monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8).numpy()
        images = ImageSet(pixels, np.arange(count) % 2)
        torch.manual_seed(0)
        model, task = nn.Linear(3, 4), Task()
        logits = fine_tune(
            task, model, images, np.arange(count), images, recipe, classes=2, precision="fp32", seed=seed, progress=iter
        )
        return SimpleNamespace(
            rates=np.array(rates), norms=norms, optimizer=made[0], task=task, logits=logits, model=model
        )

    return tune


def test_learning_rates_of_encoder_and_head(tuned):
    rates = tuned(FineTuning(epochs=1, min_steps=40, encoder_lr=1e-3, head_lr=8e-3)).rates
    expected = [
        min(step / 4, 1) if step <= 4 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 36)) for step in range(1, 41)
    ]
    np.testing.assert_allclose(rates[:, 0], 1e-3 * np.array(expected), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(rates[:, 1], 8 * rates[:, 0], rtol=1e-6)
    assert 0 < rates[0, 0] < rates[1, 0] < rates[3, 0] == 1e-3
    assert rates[-1, 0] < 3e-6


def test_groups_decay_and_limit_of_the_gradient(tuned):
    found = tuned(FineTuning(epochs=1, min_steps=5, encoder_lr=1e-3, head_lr=1e-3))
    encoder, head = found.optimizer.param_groups
    assert [value.shape for value in encoder["params"]] == [(4, 3), (4,)]
    assert [value.shape for value in head["params"]] == [(2, 4), (2,)]
    assert encoder["weight_decay"] == head["weight_decay"] == 1e-4
    # Steps so large that gradients would be, too.
    norms = tuned(FineTuning(epochs=1, min_steps=8, encoder_lr=1.0, head_lr=5.0)).norms
    assert 0.999 < max(norms) <= 1 + 1e-5


def test_an_encoder_that_does_not_learn_stays(tuned):
    torch.manual_seed(0)
    before = nn.Linear(3, 4).weight.detach()
    still = tuned(FineTuning(epochs=1, min_steps=5, encoder_lr=0.0, head_lr=1e-2))
    assert torch.equal(still.model.weight, before)
    moving = tuned(FineTuning(epochs=1, min_steps=5, encoder_lr=1e-2, head_lr=1e-2))
    assert not torch.equal(moving.model.weight, before)


@pytest.mark.parametrize(
    ("epochs", "least", "images", "steps"),
    [(3, 1, 40, 6), (3, 10, 40, 10), (0, 2, 40, 2), (2, 1, 32, 2), (2, 1, 33, 4)],
)
def test_length(tuned, epochs, least, images, steps):
    recipe = FineTuning(epochs=epochs, min_steps=least, encoder_lr=1e-3, head_lr=1e-3)
    assert recipe.steps(images) == steps
    found = tuned(recipe, images)
    assert len(found.rates) == len(found.task.batches) == steps
    # No batch has a single image: it gets one of the previous batch's.
    assert max(size for size, _ in found.task.batches) == (31 if images == 33 else min(images, 32))
    # An epoch has every image once.
    per_epoch = -(-images // 32)
    if epochs > 0 and steps >= per_epoch:
        assert sum(size for size, _ in found.task.batches[:per_epoch]) == images


def test_the_seed_decides_order_and_crops(tuned):
    recipe = FineTuning(epochs=2, min_steps=4, encoder_lr=1e-2, head_lr=1e-2)
    one, again, other = (tuned(recipe, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.logits, again.logits)
    assert not torch.equal(one.logits, other.logits)
    assert {seed for _, seed in other.task.batches} == {2}


def test_features_are_standardised_before_they_are_learnt_from(tuned, monkeypatch):
    heads = []
    original = finetuning._Classifier.__init__

    def keep(self, task, model, mean, deviation, *rest):
        heads.append((mean, deviation))
        original(self, task, model, mean, deviation, *rest)

    monkeypatch.setattr(finetuning._Classifier, "__init__", keep)
    tuned(FineTuning(epochs=1, min_steps=1, encoder_lr=0.0, head_lr=1e-3))
    (mean, deviation) = heads[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)
    features = nn.Linear(3, 4)(pixels.float().mean((2, 3))).detach()
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(deviation, features.std(0))


@pytest.mark.parametrize(("optimizer", "lr", "rate"), [("adam", 4e-3, 4e-3), ("sgd", 0.03, 1e-3), ("lars", 2.0, 1e-3)])
def test_recipes_of_evaluate(optimizer, lr, rate):
    """The rate of another optimizer than Adam is none for AdamW."""
    command = EvaluationOptions(runs=(), finetune_epochs=7, finetune_steps=9)
    evaluator = object.__new__(_Evaluator)
    evaluator._command = command
    evaluator._run = SimpleNamespace(config=SimpleNamespace(optimization=SimpleNamespace(lr=lr, optimizer=optimizer)))
    assert evaluator._recipe("finetune") == FineTuning(epochs=7, min_steps=9, encoder_lr=rate / 2, head_lr=rate)
    assert evaluator._recipe("supervised") == FineTuning(epochs=7, min_steps=9, encoder_lr=rate, head_lr=rate)
