"""The linear probe on features of which the best accuracy is known."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.measures import probe
from cpc_ext.measures.probe import encode, linear_probe

CLASSES = 4


def features(count, seed, *, distance, dimensions=16):
    """Classes as unit-variance clouds whose means lie `distance` apart along axes of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, dimensions, generator=generator)
    return noise + distance * torch.eye(dimensions)[labels], labels


def test_separable_classes():
    train, test = features(400, 0, distance=20.0), features(200, 1, distance=20.0)
    assert linear_probe(*train, *test, classes=CLASSES).accuracy == 1.0


def test_unseparable_classes():
    train, test = features(800, 0, distance=0.0), features(2000, 1, distance=0.0)
    # Four standard deviations of a binomial of 2000 tries.
    assert linear_probe(*train, *test, classes=CLASSES).accuracy == pytest.approx(1 / CLASSES, abs=0.04)


def test_regularisation_is_chosen_by_what_helps(monkeypatch):
    """A quarter as many features as images, hardly separable: the weakest strength fits noise."""
    train, test = features(400, 0, distance=1.5, dimensions=100), features(4000, 1, distance=1.5, dimensions=100)
    chosen = linear_probe(*train, *test, classes=CLASSES)
    assert chosen.strength == 0.1
    monkeypatch.setattr("cpc_ext.measures.probe._STRENGTHS", (1e-4,))
    assert chosen.accuracy > linear_probe(*train, *test, classes=CLASSES).accuracy + 0.05


@pytest.mark.parametrize(
    ("count", "splits", "size"), [(2, 2, 1), (7, 7, 1), (50, 5, 10), (600, 2, 120), (2000, 1, 400)]
)
def test_regularisation_for_few_labels_is_chosen_on_many_of_them(count, splits, size):
    """A fifth of 50 images would be ten; every one of them is held out once."""
    held_out, kept = probe._splits(count)
    assert held_out.shape == (splits, size)
    for out, rest in zip(held_out, kept, strict=True):
        assert sorted([*out.tolist(), *rest.tolist()]) == list(range(count))
    assert len(held_out.unique()) == held_out.numel()


def test_problems_solved_together_are_those_solved_alone():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (3, 20), generator=generator)
    start = torch.zeros(3, 3, 5, dtype=torch.float64)
    together = probe._fit(features, labels, start, 0.1)
    for each in range(3):
        alone = probe._fit(features[each : each + 1], labels[each : each + 1], start[:1], 0.1)
        assert torch.allclose(together[each], alone[0], atol=1e-3)


def test_scale_and_offset_of_features_do_not_matter():
    train, test = features(400, 0, distance=2.0), features(400, 1, distance=2.0)
    plain = linear_probe(*train, *test, classes=CLASSES)
    for scale, offset in ((torch.logspace(-3, 3, 16), 7), (torch.logspace(-12, -6, 16), 0)):
        moved = [(each * scale + offset, labels) for each, labels in (train, test)]
        result = linear_probe(*moved[0], *moved[1], classes=CLASSES)
        assert result.strength == plain.strength
        assert result.accuracy == pytest.approx(plain.accuracy, abs=0.005)


def test_feature_that_never_varies():
    (train, labels), (test, test_labels) = features(200, 0, distance=20.0), features(200, 1, distance=20.0)
    train[:, 5], test[:, 5] = 3.0, -3e6  # Whatever it does later.
    assert linear_probe(train, labels, test, test_labels, classes=CLASSES).accuracy == 1.0


def test_one_image_is_too_few():
    train, test = features(1, 0, distance=1.0), features(4, 1, distance=1.0)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        linear_probe(*train, *test, classes=CLASSES)


def test_encode_keeps_order_over_batches(tiny_dataset):
    images = tiny_dataset.pretrain
    means = encode(images, lambda batch: batch.float().mean((2, 3)), torch.device("cpu"))
    expected = torch.from_numpy(images.images).float().mean((2, 3))
    assert torch.allclose(means, expected)
