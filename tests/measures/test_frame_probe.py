"""The probe of frames on features of which the best accuracy is known, and each recipe's training step by step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.measures import frame_probe as module
from cpc_ext.measures.frame_probe import FrameClassifier, frame_probe, sequence_loss, summary_of_frames

CLASSES = 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clouds(count, seed, *, distance, dim=6):
    """Return classes whose means differ along separate axes, which have different scales."""
    labels = torch.arange(count) % CLASSES
    units = 10.0 ** torch.linspace(-3, 3, dim)
    return (draw(count, dim, seed=seed) + distance * torch.eye(dim)[labels]) * units + 5, labels


def probe(train, test, **options):
    return frame_probe(*train, *test, classes=CLASSES, **options)


@pytest.fixture
def quick(monkeypatch):
    """Shorten the training of probes, as such small sets need few steps."""
    short = dataclasses.replace(module._RECIPES["standard"], least_steps=150)
    monkeypatch.setitem(module._RECIPES, "standard", short)


def test_known_accuracies(quick):
    assert probe(clouds(2000, 0, distance=12.0), clouds(400, 1, distance=12.0)).accuracy == 1
    none = probe(clouds(2000, 0, distance=0.0), clouds(2000, 1, distance=0.0))
    assert none.accuracy == pytest.approx(1 / CLASSES, abs=0.05)
    # Two classes a distance d apart are told by their Bayes rule in Phi(d / 2) of cases.
    pair = [
        (features[labels < 2], labels[labels < 2])
        for features, labels in (clouds(8000, s, distance=2.0) for s in (0, 1))
    ]
    best = (1 + math.erf(2 * math.sqrt(2) / 2 / math.sqrt(2))) / 2
    assert probe(*pair).accuracy == pytest.approx(best, abs=0.02)


def test_only_a_hidden_layer_tells_what_is_not_linear(quick):
    """Quadrants of two signs, class by their product."""
    sets = [(draw(3000, 2, seed=seed), (draw(3000, 2, seed=seed).prod(1) > 0).long()) for seed in (0, 1)]
    assert probe(*sets).accuracy < 0.6
    assert probe(*sets, hidden=32).accuracy > 0.95


def test_confusion_and_majority(quick):
    train_labels = torch.tensor([2] * 30 + [0] * 20 + [1] * 20)
    train = F.one_hot(train_labels, CLASSES).float(), train_labels
    # Two of class 1 look like class 0, and all of class 3, which is not trained, like class 2.
    test_labels, looks = torch.tensor([0, 1, 1, 1, 2, 3, 3]), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    result = probe(train, (F.one_hot(looks, CLASSES).float(), test_labels))
    assert result.confusion.tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0]]
    assert result.accuracy == pytest.approx(3 / 7)
    assert result.majority == pytest.approx(1 / 7)


def test_a_feature_that_never_varies_does_no_harm(quick):
    (features, labels), test = clouds(2000, 0, distance=12.0), clouds(400, 1, distance=12.0)
    train, test = ((torch.cat([f, torch.full((len(f), 1), 3.0)], 1), y) for f, y in ((features, labels), test))
    assert probe(train, test).accuracy == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_probe_learns_where_nothing_else_does(quick, mode):
    expected = probe(clouds(100, 0, distance=2.0), clouds(100, 1, distance=2.0))
    with mode():
        found = probe(clouds(100, 0, distance=2.0), clouds(100, 1, distance=2.0))
    assert found.accuracy == expected.accuracy > 0.5
    (features, labels), test = clouds(100, 0, distance=2.0), clouds(100, 1, distance=2.0)
    learned = torch.ones(6, requires_grad=True)
    assert probe((features * learned, labels), test).accuracy == expected.accuracy


def test_the_caller_s_random_numbers_stay_as_they_were_and_decide_nothing(quick):
    train, test = clouds(300, 0, distance=1.0), clouds(3000, 1, distance=1.0)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(probe(train, test, hidden=8).confusion)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*results)
    assert not torch.equal(results[0], probe(train, test, hidden=8, seed=1).confusion)


def test_chunks_of_predictions(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    model, features = FrameClassifier(5, 3, hidden=4), draw(20, 5)
    assert torch.equal(model.predict(features), model(features).argmax(1))
    assert [tuple(p.shape) for p in FrameClassifier(5, 3).parameters()] == [(3, 5), (3,)]


# --- The recipes ---


@pytest.fixture
def steps(monkeypatch):
    """Features of the frames of each step, weights at the first, and the optimizer."""
    seen = []
    loss = FrameClassifier.loss

    def recorded(self, features, labels):
        seen.append((features, labels, self))
        return loss(self, features, labels)

    monkeypatch.setattr(FrameClassifier, "loss", recorded)
    adam = torch.optim.Adam
    made = []

    class Adam(adam):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.rates = []
            self.first = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            made.append(self)

        def step(self, *arguments, **options):
            self.rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    return seen, made


def numbered(count):
    """Frames whose feature is their number, in the first column."""
    return torch.cat([torch.arange(count)[:, None].float(), draw(count, 2)], 1), torch.arange(count) % CLASSES


def test_a_step_of_greedy_infomax_is_an_utterance(steps):
    seen, (train, lengths) = steps[0], (numbered(30), [7, 0, 11, 12])
    probe(train, numbered(5), recipe="greedy-infomax", train_lengths=lengths)
    (optimizer,) = steps[1]
    batches = [features[:, 0].long().tolist() for features, _, _ in seen]
    utterances = [list(range(7)), list(range(7, 18)), list(range(18, 30))]
    assert len(batches) == 20 * 3
    for epoch in range(20):
        assert sorted(batches[3 * epoch : 3 * epoch + 3]) == utterances
    assert len({tuple(map(tuple, batches[3 * e : 3 * e + 3])) for e in range(20)}) > 3
    assert all(
        torch.equal(labels, torch.tensor(batch) % CLASSES) for (_, labels, _), batch in zip(seen, batches, strict=True)
    )
    assert set(optimizer.rates) == {1e-4}
    assert optimizer.param_groups[0]["eps"] == 1e-8
    weight = optimizer.first[0]
    bound = 1 / math.sqrt(3)  # PyTorch's own initial weights stay within it.
    assert weight.abs().max() > bound
    with pytest.raises(ValueError, match="train_lengths: expected the utterances' frames, 30 in all"):
        probe(train, numbered(5), recipe="greedy-infomax", train_lengths=[7, 11])
    with pytest.raises(ValueError, match="train_lengths"):
        probe(train, numbered(5), recipe="greedy-infomax")


def test_a_step_of_cpc_audio_is_eight_windows(steps):
    probe(numbered(128 * 11 + 5), numbered(5), recipe="cpc-audio")
    (optimizer,) = steps[1]
    batches = [features[:, 0].long() for features, _, _ in steps[0]]
    assert len(batches) == 10 * 2
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(128 * 11 + 5))
        begins = first[torch.cat([torch.tensor([True]), first.diff() != 1])]
        assert begins.remainder(128).eq(0).all()
        assert len((first // 128).unique()) == 8
    assert set(optimizer.rates) == {2e-4}
    assert optimizer.param_groups[0]["eps"] == 2e-8
    assert optimizer.first[0].abs().max() < 1 / math.sqrt(3)


def test_the_standard_recipe_standardises_and_its_steps_become_smaller(steps):
    (train, labels), (test, test_labels) = numbered(1100), numbered(5)
    # A feature that never varies, but for what its mean is rounded by.
    train, test = (torch.cat([features, torch.full((len(features), 1), 1234.567)], 1) for features in (train, test))
    probe((train, labels), (test, test_labels))
    features = torch.cat([features for features, _, _ in steps[0][:3]])
    assert not features[:, 3].any()
    features = features[:, :3]
    assert [len(features) for features, _, _ in steps[0][:4]] == [512, 512, 76, 512]
    torch.testing.assert_close(features.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.square().mean(0), torch.ones(3))
    rates = steps[1][0].rates
    assert rates == pytest.approx([1e-2 * (1 - step / 1002) for step in range(1002)])


# --- Other losses, speakers, wrong arguments ---


def test_the_loss_of_a_sequence_sums_over_all_ways_to_place_it():
    """Two frames, one label: label twice, or once beside a blank; the same where it is repeated."""
    logits = draw(1, 2, 3).double()
    p = logits.softmax(2)[0]
    expected = -(p[0, 1] * p[1, 1] + p[0, 1] * p[1, 2] + p[0, 2] * p[1, 1]).log()
    torch.testing.assert_close(sequence_loss(logits, torch.tensor([[1, 1]])), expected)
    both = -(p[0, 1] * p[1, 0]).log() / 2
    torch.testing.assert_close(sequence_loss(logits, torch.tensor([[1, 0]])), both)


def test_summaries():
    frames = draw(5, 3)
    torch.testing.assert_close(summary_of_frames(frames), frames.sum(0) / 5)
    assert torch.equal(summary_of_frames(frames, "last"), frames[4])
    with pytest.raises(ValueError, match="frames: expected at least one"):
        summary_of_frames(frames[:0])
    with pytest.raises(ValueError, match="how: expected one of mean, last, got 'first'"):
        summary_of_frames(frames, "first")


@pytest.mark.parametrize("which", ["train", "test"])
def test_wrong_arguments(which):
    sets = {"train": clouds(20, 0, distance=1.0), "test": clouds(20, 1, distance=1.0)}
    features, labels = sets[which]
    infinite = features.clone()
    infinite[3, 2] = torch.inf
    for wrong, message in (
        ((features[:, 0], labels), rf"{which}_features: expected \[F, D\] and as many labels, got \[20\] and \[20\]"),
        ((features, labels[1:]), rf"{which}_features: expected .* got \[20, 6\] and \[19\]"),
        ((features[:0], labels[:0]), f"{which}_features"),
        ((features, labels + 1), f"{which}_labels: expected 0 to 3, got 1 to 4"),
        ((features, labels - 1), f"{which}_labels: expected 0 to 3, got -1 to 2"),
        ((infinite, labels), f"{which}_features: expected finite numbers, got 1 of 20 rows"),
    ):
        given = sets | {which: wrong}
        with pytest.raises(ValueError, match=message):
            probe(given["train"], given["test"])
    with pytest.raises(ValueError, match="recipe: expected one of standard, greedy-infomax, cpc-audio, got 'original'"):
        probe(sets["train"], sets["test"], recipe="original")
