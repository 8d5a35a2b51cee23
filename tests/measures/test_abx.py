"""ABX error and the warped distance behind it, against their definitions written down plainly."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from cpc_ext._native import native
from cpc_ext.measures import abx
from cpc_ext.measures.abx import AbxItems, abx_error, abx_items, dtw_distances


def items_at(onset, offset, *others):
    """Items of these intervals; phone, previous, following and speaker are zeros where they are not given."""
    columns = [np.array(onset), np.array(offset), *map(np.array, others)]
    return AbxItems(*columns, *(np.zeros(len(onset), np.int64) for _ in range(6 - len(columns))))


def angles(x, y):
    """[n, m] in float64, as fractions of half a turn; arctangents, unlike arccosines, are exact for small ones."""
    x, y = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))
    differences, sums = ((x[:, None] + sign * y).norm(dim=2) for sign in (-1, 1))
    return (2 * torch.atan2(differences, sums) / math.pi).numpy()


def warped(cost):
    """Distance of two items whose frames are `cost` apart: the recurrence, and the path back from the end."""
    n, m = cost.shape
    total = np.full((n, m), np.inf)
    for i, j in np.ndindex(n, m):
        before = [total[i - 1, j - 1]] * (i > 0 < j) + [total[i, j - 1]] * (j > 0) + [total[i - 1, j]] * (i > 0)
        total[i, j] = cost[i, j] + min(before, default=0)
    i, j, cells = n - 1, m - 1, 1
    while i > 0 or j > 0:
        steps = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        i, j = min((step for step in steps if min(step) >= 0), key=lambda step: total[step])  # The first of equals.
        cells += 1
    return total[-1, -1] / cells


def every_pair(count):
    return np.stack(np.meshgrid(range(count), range(count), indexing="ij"), axis=2).reshape(-1, 2)


@pytest.mark.parametrize("dim", [1, 3, 40, 129])
def test_distances_are_those_of_the_definition(dim):
    """Lengths around those of tiles, 6 rows and up to 64 columns, and one frame."""
    lengths = [1, 2, 6, 7, 9, 13, 16, 17, 65]
    features = torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(0))
    ends = np.cumsum(lengths)
    items, pairs = items_at(ends - lengths, ends), every_pair(len(lengths))
    parts = features.split(lengths)
    expected = [warped(angles(parts[x], parts[y])) for x, y in pairs]
    distances = dtw_distances(features, items, pairs)
    assert distances.dtype == np.float32
    # Arccosines of float32 products: of small angles, such as those of a frame and itself, little is left.
    np.testing.assert_allclose(distances, expected, atol=5e-4)
    others = pairs[:, 0] != pairs[:, 1]
    np.testing.assert_allclose(distances[others], np.array(expected)[others], atol=2e-4 if dim == 1 else 3e-6)
    shuffled = np.random.default_rng(0).permutation(len(pairs))
    np.testing.assert_array_equal(dtw_distances(features, items, pairs[shuffled]), distances[shuffled])


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 3), (4, 3), (2, 5)])
def test_the_path_is_the_cheapest_of_all(n, m):
    @functools.cache
    def paths(i, j):
        """All paths from the first cell to this one."""
        if (i, j) == (0, 0):
            return [[(0, 0)]]
        before = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        return [[*path, (i, j)] for cell in before if min(cell) >= 0 for path in paths(*cell)]

    features = torch.randn(n + m, 4, generator=torch.Generator().manual_seed(n))
    cost = angles(features[:n], features[n:])
    best = min(paths(n - 1, m - 1), key=lambda path: sum(cost[cell] for cell in path))
    (distance,) = dtw_distances(features, items_at([0, n], [n, n + m]), np.array([[0, 1]]))
    assert distance == pytest.approx(sum(cost[cell] for cell in best) / len(best), abs=1e-6)


def test_of_paths_that_cost_the_same_the_first_is_taken():
    """Frames are at right angles or the same, so that many sums are equal; paths of the same sum differ in length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    direction, ends = rng.integers(0, 2, lengths.sum()), np.cumsum(lengths)
    items, pairs = items_at(ends - lengths, ends), every_pair(40)
    parts = np.split(direction, ends[:-1])
    expected = [warped(0.5 * (parts[x][:, None] != parts[y])) for x, y in pairs]
    np.testing.assert_allclose(dtw_distances(torch.eye(2)[direction], items, pairs), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("angle", "share"), [(0.0, 0), (1e-3, None), (0.3, None), (math.pi / 2, 0.5), (2.0, None), (math.pi, 1)]
)
def test_single_frames_are_their_angle_apart(angle, share):
    features = torch.tensor([[2.0, 0], [3 * math.cos(angle), 3 * math.sin(angle)]])
    (distance,) = dtw_distances(features, items_at([0, 1], [1, 2]), np.array([[0, 1]]))
    assert distance == pytest.approx(angle / math.pi if share is None else share, abs=1e-4)


def test_frames_of_zeros_are_opposite_to_all_but_each_other():
    features = torch.tensor([[0.0, 0], [0, 0], [1, 0], [-1, 0], [1, 1e-3]])
    distances = dtw_distances(features, items_at(range(5), range(1, 6)), every_pair(5)).reshape(5, 5)
    assert distances[0].tolist() == distances[:, 1].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(distances[2, 2:], [0, 1, 1e-3 / math.pi], atol=1e-4)


@pytest.mark.parametrize(
    ("onset", "offset", "pair", "message"),
    [
        ([0, 3], [3, 6], [0, 1], "first and count must name at least one of 5 frames, got 3 and 3 for item 1"),
        ([-1, 3], [3, 5], [0, 1], "got -1 and 4 for item 0"),
        ([0, 3], [0, 5], [0, 1], "got 0 and 0 for item 0"),
        ([2**62, 3], [2**62 + 2, 5], [0, 1], "first and count"),
        ([0, 3], [3, 5], [0, 2], "pairs must name items, 0 to 1, got 2"),
        ([0, 3], [3, 5], [-1, 1], "pairs must name items, 0 to 1, got -1"),
    ],
)
def test_items_and_pairs_that_are_not_there_are_refused(onset, offset, pair, message):
    with pytest.raises(ValueError, match=message):
        dtw_distances(torch.ones(5, 2), items_at(onset, offset), np.array([pair]))


def test_features_that_are_not_finite_are_refused():
    features = torch.ones(3, 2)
    features[1, 0] = torch.nan
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        dtw_distances(features, items_at([0], [3]), np.array([[0, 0]]))


def test_the_kernel_takes_numpy_arrays_in_several_threads():
    before = torch.get_num_threads()
    features = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    items, pairs = items_at(range(0, 400, 10), range(10, 401, 10)), every_pair(40)
    one, several = (torch.set_num_threads(n) or dtw_distances(features, items, pairs) for n in (1, 3))
    torch.set_num_threads(before)
    np.testing.assert_array_equal(one, several)
    assert not np.shares_memory(one, several)
    with pytest.raises(ValueError, match="frames"):
        native.dtw_distances(features.double().numpy(), items.onset, items.offset, pairs, one)


# --- Items ---

SIL, A, B, C = 0, 1, 2, 3
UTTERANCES = [torch.tensor([SIL, A, A, B, C, C, C, SIL, B]), torch.tensor([A, B, C, SIL, SIL]), torch.tensor([C])]


def rows(items):
    return list(zip(*(column.tolist() for column in vars(items).values()), strict=True))


def test_phones_are_runs_of_a_label():
    assert rows(abx_items(UTTERANCES, [7, 8, 7], unit="phone")) == [
        (1, 3, A, SIL, B, 7),
        (3, 4, B, A, C, 7),
        (4, 7, C, B, SIL, 7),
        (8, 9, B, SIL, -1, 7),
        (9, 10, A, -1, B, 8),
        (10, 11, B, A, C, 8),
        (11, 12, C, B, SIL, 8),
        (14, 15, C, -1, -1, 7),
    ]


def test_triphones_have_their_neighbours_in_them():
    assert rows(abx_items(UTTERANCES, [7, 8, 7])) == [(1, 7, B, A, C, 7), (9, 12, B, A, C, 8)]
    with_silence = rows(abx_items(UTTERANCES[:1], [7], silence=None))
    assert with_silence[0] == (0, 4, A, SIL, B, 7)
    assert with_silence[-1] == (4, 9, SIL, C, B, 7)
    assert len(with_silence) == 4


def test_no_utterances_and_no_frames_have_no_items():
    none = abx_items([], [])
    assert rows(none) == []
    assert none.onset.dtype == np.int64
    assert rows(abx_items([torch.empty(0, dtype=torch.int64)], [3], unit="phone")) == []
    with pytest.raises(ValueError, match="zip"):
        abx_items(UTTERANCES, [7, 8])
    with pytest.raises(ValueError, match="unit: expected one of triphone, phone, got 'word'"):
        abx_items(UTTERANCES, [7, 8, 7], unit="word")


# --- The error ---


def a_set(seed=0, count=60, phones=3, contexts=2, speakers=3, dim=6, signal=0.5):
    """Items of one to four frames, whose direction tells their phone a little."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, count)
    phone, context, speaker = (rng.integers(0, n, count) for n in (phones, contexts, speakers))
    means = rng.normal(size=(phones, dim)) * signal
    features = rng.normal(size=(lengths.sum(), dim)) + means[phone.repeat(lengths)]
    ends = np.cumsum(lengths)
    return torch.tensor(features), AbxItems(ends - lengths, ends, phone, context, 1 - context, speaker)


def by_hand(features, items, *, across, any_context):
    """The definition, triple by triple."""
    parts = [features[onset:offset] for onset, offset in zip(items.onset, items.offset, strict=True)]
    distance = functools.cache(lambda i, j: warped(angles(parts[i], parts[j])))
    context = [0 if any_context else pair for pair in zip(items.previous, items.following, strict=True)]
    phone, speaker = items.phone.tolist(), items.speaker.tolist()
    told = {}
    for a, b, x in itertools.permutations(range(len(phone)), 3):
        phones_fit = phone[a] == phone[x] != phone[b]
        speakers_fit = speaker[a] == speaker[b] and (speaker[a] != speaker[x]) == across
        if not (phones_fit and speakers_fit and context[a] == context[b] == context[x]):
            continue
        key = phone[a], phone[b], speaker[a], context[a], speaker[x]
        to_a, to_b = distance(x, a), distance(x, b)
        told.setdefault(key, []).append(float(to_a > to_b) + 0.5 * (to_a == to_b))
    means = {key: np.mean(values) for key, values in told.items()}
    for kept in (3, 2):  # Phones and speaker; phones.
        groups = {}
        for key, value in means.items():
            groups.setdefault(key[:kept], []).append(value)
        means = {key: np.mean(values) for key, values in groups.items()}
    return np.mean(list(means.values())), sum(map(len, told.values()))


@pytest.mark.parametrize("any_context", [False, True])
@pytest.mark.parametrize("speaker", ["within", "across"])
def test_the_error_is_that_of_the_definition(speaker, any_context):
    features, items = a_set()
    error, triples = by_hand(features, items, across=speaker == "across", any_context=any_context)
    result = abx_error(features, items, speaker=speaker, any_context=any_context, most_items=100, most_speakers=9)
    assert result.triples == triples
    assert result.error == pytest.approx(error, abs=1e-9)
    assert 0.1 < error < 0.45


def test_batches_do_not_change_the_error(monkeypatch):
    features, items = a_set()
    whole = [abx_error(features, items, speaker=speaker) for speaker in ("within", "across")]
    monkeypatch.setattr(abx, "_BATCH", 10)
    assert [abx_error(features, items, speaker=speaker) for speaker in ("within", "across")] == whole
    cells = abx._Cells(items, False, 10, np.random.default_rng(0))
    batches = list(abx._batches(cells, abx._within(cells)))
    assert len(batches) > 4
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate(list(abx._within(cells))))


def test_what_cannot_be_told_is_chance_and_what_can_is_right():
    features, items = a_set(count=40)
    assert abx_error(torch.ones(features.shape), items).error == 0.5
    frames = torch.eye(3)[np.repeat(items.phone, items.offset - items.onset)]
    assert abx_error(frames, items).error == abx_error(frames, items, speaker="across").error == 0
    # A direction for each speaker: X of another is as far from A as from B, or of the same at no distance from either.
    frames = torch.eye(4)[np.repeat(items.speaker, items.offset - items.onset)]
    assert abx_error(frames, items).error == abx_error(frames, items, speaker="across").error == 0.5


@pytest.mark.parametrize(("speaker", "most"), [("within", {"most_items": 3}), ("across", {"most_speakers": 1})])
def test_limits_draw_from_what_there_is(speaker, most):
    features, items = a_set(count=150, contexts=1, speakers=4)
    whole = abx_error(features, items, speaker=speaker, most_items=1000, most_speakers=9)
    draws = [abx_error(features, items, speaker=speaker, **most, seed=seed) for seed in range(30)]
    assert draws[3] == abx_error(features, items, speaker=speaker, **most, seed=3)
    assert len({draw.error for draw in draws}) > 20
    # Three of each cell, or one of the three other speakers of X: for each A, of 4 speakers and 3 phones, and each B.
    if speaker == "within":
        assert {draw.triples for draw in draws} == {4 * 3 * 2 * (3 * 2 * 3)}
    errors = [draw.error for draw in draws]
    assert np.mean(errors) == pytest.approx(whole.error, abs=4 * np.std(errors) / math.sqrt(len(errors)))


def test_nothing_is_drawn_twice():
    """Each item has a direction of its own: none is nearer to X than another, unless it is X."""
    items = items_at(
        range(90), range(1, 91), np.arange(90) % 2, np.zeros(90, int), np.zeros(90, int), np.arange(90) % 3
    )
    for seed in range(5):
        for speaker in ("within", "across"):
            assert abx_error(torch.eye(90), items, speaker=speaker, most_items=8, seed=seed).error == 0.5
    cells = abx._Cells(items, False, 8, np.random.default_rng(0))
    triples = np.concatenate(list(abx._across(cells, 1, np.random.default_rng(0))))
    assert len(triples) == 3 * 2
    items = items_at(
        range(12), range(1, 13), np.arange(12) % 2, np.zeros(12, int), np.zeros(12, int), np.arange(12) // 2
    )
    cells = abx._Cells(items, False, 8, np.random.default_rng(0))
    for seed in range(5):
        triples = np.concatenate(list(abx._across(cells, 4, np.random.default_rng(seed))))
        assert len(np.unique(triples, axis=0)) == len(triples) == 12 * 4


def test_limits_are_libri_lights_where_none_are_given():
    """Eight speakers say each of two phones twelve times: ten of them, and X of five others."""
    number = np.arange(192)
    zeros = np.zeros(192, int)
    items = items_at(number, number + 1, number % 2, zeros, zeros, number // 24)
    assert abx_error(torch.ones(192, 1), items).triples == 8 * 2 * 10 * 9 * 10
    assert abx_error(torch.ones(192, 1), items, speaker="across").triples == 8 * 2 * 5 * 10**3


def test_across_takes_so_many_speakers_of_x():
    """An item each of six speakers and two phones: for each of twelve A the one B, and three X of the five."""
    speaker, phone = np.divmod(np.arange(12), 2)
    items = items_at(range(12), range(1, 13), phone, np.zeros(12, int), np.zeros(12, int), speaker)
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert [abx_error(features, items, speaker="across", most_speakers=n).triples for n in (3, 5, 9)] == [36, 60, 60]


@pytest.mark.parametrize("speaker", ["within", "across"])
def test_nothing_to_compare_is_an_error(speaker):
    features = torch.ones(3, 2)
    items = items_at([0, 1, 2], [1, 2, 3], [1, 1, 2], [0, 0, 0], [0, 0, 1], [5, 6, 5])
    with pytest.raises(ValueError, match="items: no two phones in the same context to compare"):
        abx_error(features, items, speaker=speaker)
    empty = items_at([], [])
    with pytest.raises(ValueError, match="items: no two phones"):
        abx_error(features, empty, speaker=speaker)


def test_an_unknown_condition_is_an_error():
    with pytest.raises(ValueError, match="speaker: expected one of within, across, got 'both'"):
        abx_error(torch.ones(3, 2), items_at([0], [1]), speaker="both")
