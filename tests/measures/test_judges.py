"""The evaluations of encodings by themselves: linear classifier, nearest neighbours, label subsets, training length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cpc_ext.data import ImageSet
from cpc_ext.evaluation.finetuning import FineTuning
from cpc_ext.measures import knn, probe
from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.measures.knn import knn_accuracy, knn_scores
from cpc_ext.measures.label_subsets import LabelBudget, parse_label_budgets
from cpc_ext.measures.probe import encode, fit_linear_classifier, linear_probe
from cpc_ext.training.errors import TrainingError

CPU = torch.device("cpu")


def clouds(count: int, seed: int, *, distance: float = 3.0, classes: int = 3, size: int = 5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return torch.randn(count, size, generator=generator) + distance * torch.eye(size)[labels], labels


# Arguments that all of them refuse, and contexts in which they may be called.


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_encodings_that_are_not_finite_are_refused(value):
    """A single one among many would leave a probe and its neighbours at chance."""
    features, labels = clouds(60, 0)
    wrong = features.clone()
    wrong[7, 2] = wrong[50] = value
    for name, found in (
        ("labelled", lambda: knn_scores(wrong, labels, features, classes=3)),
        ("queries", lambda: knn_accuracy(features, labels, wrong, labels, classes=3)),
        ("features", lambda: linear_probe(wrong, labels, features, labels, classes=3)),
        ("test_features", lambda: linear_probe(features, labels, wrong, labels, classes=3)),
        ("features", lambda: effective_rank(wrong)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected finite numbers, got 2 of 60 rows with others$"):
            found()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_classifier_is_fitted_alike_where_nothing_else_learns(mode):
    expected = fit_linear_classifier(*clouds(60, 0), classes=3).weights
    with mode():
        for dtype in (torch.float32, torch.float64):
            features, labels = clouds(60, 0)
            found = fit_linear_classifier(features.to(dtype), labels, classes=3)
            torch.testing.assert_close(found.weights, expected, atol=1e-5, rtol=1e-5)
            result = linear_probe(features.to(dtype), labels, features, labels, classes=3)
            assert result.accuracy == found.logits(features).argmax(1).eq(labels).double().mean()


def test_a_classifier_leaves_no_graph_of_the_encoder():
    features, labels = clouds(60, 0)
    learned = features.clone().requires_grad_()
    found = fit_linear_classifier(2 * learned, labels, classes=3)
    assert torch.equal(found.weights, fit_linear_classifier(2 * features, labels, classes=3).weights)
    assert not found.weights.requires_grad
    assert not found.mean.requires_grad
    assert learned.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_rounding_errors_count_as_features_that_never_vary(dtype):
    """One of 1 and 1 plus some roundings is constant; one that varies by a hundred of them is not."""
    rounding, sign = torch.finfo(dtype).eps, 1.0 - 2 * (torch.arange(40) % 2)
    sign = sign.to(dtype)
    features = torch.stack([1 + 3 * rounding * sign, 1 + 100 * rounding * sign], dim=1)
    classifier = fit_linear_classifier(features, torch.arange(40) % 2, classes=2)
    assert classifier.deviation[0] == torch.inf
    torch.testing.assert_close(classifier.deviation[1].item(), 100 * rounding * (40 / 39) ** 0.5, rtol=0.02, atol=0)


# The linear classifier.


def test_classifier_is_at_the_minimum_of_the_regularised_loss():
    """Mean cross-entropy + strength / 2 · |weights|² of standardised features; biases are free."""
    features, labels = clouds(60, 0, distance=1.0)
    features = 100 + 7 * features
    classifier = fit_linear_classifier(features, labels, classes=3)
    assert classifier.weights.shape == (3, 6)
    assert classifier.weights.dtype == torch.float64
    torch.testing.assert_close(classifier.mean, features.double().mean(0))
    torch.testing.assert_close(classifier.deviation, features.double().std(0))
    weights = classifier.weights.clone().requires_grad_()
    standardised = (features.double() - classifier.mean) / classifier.deviation
    logits = standardised @ weights[:, :-1].T + weights[:, -1]
    loss = F.cross_entropy(logits, labels) + classifier.strength / 2 * weights[:, :-1].square().sum()
    loss.backward()
    assert weights.grad.abs().max() < 1e-4
    torch.testing.assert_close(classifier.logits(features), logits.detach())
    assert classifier.strength in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


def test_features_that_are_nearly_the_same_are_fitted_to_the_end(monkeypatch):
    """With hardly any regularisation the minimum lies in a long and narrow valley."""
    monkeypatch.setattr(probe, "_STRENGTHS", (1e-4,))
    features, labels = clouds(60, 0, distance=1.0)
    features = torch.cat([features, features + 0.05 * clouds(60, 1, distance=0.0)[0]], dim=1)
    classifier = fit_linear_classifier(features, labels, classes=3)
    weights = classifier.weights.clone().requires_grad_()
    standardised = (features.double() - classifier.mean) / classifier.deviation
    logits = standardised @ weights[:, :-1].T + weights[:, -1]
    (F.cross_entropy(logits, labels) + 1e-4 / 2 * weights[:, :-1].square().sum()).backward()
    assert weights.grad.abs().max() < 1e-5


def test_of_equally_good_strengths_the_stronger_is_taken():
    features, labels = clouds(40, 0, distance=50.0)
    assert fit_linear_classifier(features, labels, classes=3).strength == 1.0


def test_the_strength_is_taken_that_is_right_more_often(monkeypatch):
    """The first leaves nothing but biases, which name the commonest class."""
    monkeypatch.setattr(probe, "_STRENGTHS", (1e4, 1e-2, 1e3))
    features, labels = clouds(60, 0, distance=50.0)
    assert fit_linear_classifier(features, labels, classes=3).strength == 1e-2


def test_accuracy_is_the_share_of_right_answers_and_the_strength_is_told():
    features, labels = clouds(60, 0, distance=50.0)
    wrong = labels.clone()
    wrong[:15] = (wrong[:15] + 1) % 3
    result = linear_probe(features, labels, features, wrong, classes=3)
    assert result.accuracy == pytest.approx(0.75, abs=1e-12)
    assert result.strength == 1.0


def test_two_images_are_enough_and_one_is_not():
    features = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    classifier = fit_linear_classifier(features, torch.tensor([0, 1]), classes=2)
    assert classifier.logits(features).argmax(1).tolist() == [0, 1]
    assert classifier.deviation[1].item() == torch.inf
    with pytest.raises(ValueError, match=r"^features: expected at least 2 images, got 1$"):
        fit_linear_classifier(features[:1], torch.tensor([0]), classes=2)


def test_encode_gives_batches_of_fifty_and_says_so():
    images = ImageSet(np.arange(120, dtype=np.uint8)[:, None, None, None])
    sizes, steps = [], []

    def features(batch):
        sizes.append(len(batch))
        return batch.flatten(1).half()

    def progress(batches):
        steps.append(list(batches))
        return batches

    found = encode(images, features, CPU, progress=progress)
    assert (found.dtype, found.flatten().tolist()) == (torch.float32, list(range(120)))
    assert (sizes, steps) == ([50, 50, 20], [[0, 50, 100]])
    assert torch.equal(encode(images, features, CPU), found)
    parameter = torch.ones(1, requires_grad=True)
    assert not encode(images, lambda batch: batch.flatten(1) * parameter, CPU).requires_grad


# Nearest neighbours.


def test_neighbours_are_as_many_as_told_and_by_default_those_of_the_paper():
    labelled = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-1.0, 0.0]]), dim=1)
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[5.0, 0.0]])
    one, two, many = (
        knn_scores(labelled, labels, query, classes=4, neighbours=number, temperature=0.5) for number in (1, 2, 9)
    )
    assert (one > 0).tolist() == [[True, False, False, False]]
    assert (two > 0).tolist() == [[True, True, False, False]]
    assert (many > 0).tolist() == [[True, True, True, False]]
    assert one[0, 0].item() == pytest.approx(1.0)
    assert many[0, 2].item() == pytest.approx(np.exp(-2 / 0.5))
    assert (knn.NEIGHBOURS, knn.TEMPERATURE) == (200, 0.07)
    assert torch.equal(
        knn_scores(labelled, labels, query, classes=4),
        knn_scores(labelled, labels, query, classes=4, neighbours=200, temperature=0.07),
    )
    assert many.dtype == torch.float64


def test_scores_do_not_depend_on_the_length_of_encodings_nor_on_chunks(monkeypatch):
    labelled, labels = clouds(30, 0)
    queries, _ = clouds(7, 1)
    plain = knn_scores(labelled, labels, queries, classes=3, neighbours=4)
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    torch.testing.assert_close(knn_scores(labelled * lengths, labels, 9 * queries, classes=3, neighbours=4), plain)
    monkeypatch.setattr(knn, "_CHUNK", 2)
    torch.testing.assert_close(knn_scores(labelled, labels, queries, classes=3, neighbours=4), plain)
    assert knn_scores(labelled, labels, queries[:0], classes=3).shape == (0, 3)


# Subsets of labels.


def test_budgets_are_shares_or_numbers():
    assert parse_label_budgets("3, 25% ,100%,3") == [
        LabelBudget(per_class=3),
        LabelBudget(share=0.25),
        LabelBudget(share=1.0),
    ]
    assert [str(budget) for budget in parse_label_budgets("1,12.5%")] == ["1", "12.5%"]


@pytest.mark.parametrize("text", ["0", "-1", "0%", "100.5%", "-3%", "ten", "", "5,", "1.5", "%", "nan%"])
def test_what_is_no_budget(text):
    with pytest.raises(TrainingError, match=r"^--labels: expected labels per class such as 10, or shares above 0% up"):
        parse_label_budgets(text)


@pytest.mark.parametrize(
    ("share", "counts"), [(0.1, [1, 3, 7]), (0.25, [2, 7, 17]), (0.001, [1, 1, 1]), (1.0, [8, 29, 67])]
)
def test_shares_are_rounded_to_the_nearest_and_at_least_one(share, counts):
    labels = np.repeat(np.arange(3), (8, 29, 67))
    found = LabelBudget(share=share).subset(labels, ("a", "b", "c"), seed=0, draw=0)
    assert np.bincount(labels[found]).tolist() == counts
    assert (np.diff(found) > 0).all()


def test_draws_of_a_class_do_not_depend_on_other_classes():
    few, many = np.repeat([0, 1], (20, 20)), np.repeat([0, 1], (20, 90))
    budget = LabelBudget(per_class=5)
    first, second = (budget.subset(labels, ("a", "b"), seed=1, draw=2) for labels in (few, many))
    assert first[:5].tolist() == second[:5].tolist()
    places = [budget.subset(few, ("a", "b"), seed=seed, draw=draw) for seed, draw in ((1, 2), (1, 3), (2, 2))]
    assert len({tuple(place) for place in places}) == 3
    # The two classes of equal size are drawn from at different places.
    assert (first[:5]).tolist() != (first[5:] - 20).tolist()


def test_a_class_without_enough_labels_is_named():
    labels = np.array([0, 0, 2, 2, 2, 1])
    with pytest.raises(TrainingError, match=r"^--labels 2: class dog has 1 labelled training images$"):
        LabelBudget(per_class=2).subset(labels, ("cat", "dog", "owl"), seed=0, draw=0)
    for budget in (LabelBudget(per_class=1), LabelBudget(share=0.1)):  # One is enough for a share.
        assert len(budget.subset(labels, ("cat", "dog", "owl"), seed=0, draw=0)) == 3


# The number of updates of fine-tuning.


@pytest.mark.parametrize(
    ("images", "epochs", "least", "steps"),
    [(32, 3, 1, 3), (33, 3, 1, 6), (1, 5, 1, 5), (64, 2, 9, 9), (64, 5, 9, 10), (100, 0, 7, 7)],
)
def test_steps_of_fine_tuning(images, epochs, least, steps):
    recipe = FineTuning(epochs=epochs, min_steps=least, encoder_lr=1.0, head_lr=1.0)
    assert recipe.steps(images) == steps


def test_accuracy_of_the_nearest_is_the_share_of_right_answers():
    keys = torch.eye(3)[[0, 0, 1, 2]]
    labels = torch.tensor([1, 1, 0, 2])
    queries = torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.0, 0.1, 1.0], [0.1, 0.0, 1.0]])
    for expected, share in (([1, 0, 2, 2], 1.0), ([1, 0, 0, 2], 0.75), ([0, 1, 0, 0], 0.0)):
        assert knn_accuracy(keys, labels, queries, torch.tensor(expected), classes=3, neighbours=1) == share
    # All vote, and the one that is near outweighs the two that are not.
    assert knn_accuracy(keys, labels, queries[1:2], torch.tensor([0]), classes=3) == 1.0


def test_encodings_of_chosen_images_alone():
    images = ImageSet(np.arange(120, dtype=np.uint8).reshape(120, 1, 1, 1))
    found = encode(images, lambda batch: batch.flatten(1).float(), CPU, chosen=np.array([7, 3, *range(60, 120)]))
    assert found.flatten().tolist() == [7, 3, *range(60, 120)]
