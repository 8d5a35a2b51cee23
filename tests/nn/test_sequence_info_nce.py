"""The objective of sequences against its definition, position by position, and the distribution of its negatives."""

import math

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.nn import SequenceInfoNCE, SequenceNegatives

EXACT = {"atol": 1e-12, "rtol": 0}
B, D, E, L, K, S = 3, 5, 4, 9, 2, 6
# Ways of drawing, and options that they are tried with.
DRAWN = {
    "permuted": {},
    "offsets": {},
    "same-sequence": {},
    "shifted": {"exclude_positive": True},
}


def sequences(batch=B, frames=L):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, D, frames, generator=generator, dtype=torch.float64)
    c = torch.randn(batch, E, frames, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), c.requires_grad_()


def make(**options):
    torch.manual_seed(1)
    return SequenceInfoNCE(D, E, **{"pred_steps": K, "neg_samples": S, **options}).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def negatives_of(objective, draws, batch, step, b, t, window):
    """Return the (sequence, frame) of negatives as documented for each kind of sampling. t: position in the window."""
    begin = 0 if draws.begin is None else int(draws.begin)
    count = window - (K if objective.common_positions else step)
    row, rows = b * count + t, batch * count
    places = draws.places
    if objective.sampling == "all":
        every = [(other, time) for other in range(batch) for time in range(L)]
        return [place for place in every if place != (b, begin + t + step)]
    if objective.sampling == "permuted":
        return [divmod(int(one), L) for one in places[:, places.shape[1] - rows + row]]
    if objective.sampling == "offsets":
        found = [divmod((row + int(one)) % rows, count) for one in places[step - 1][:, row]]
        return [(other, begin + time + step) for other, time in found]
    if objective.sampling == "same-sequence":
        shift = 0 if draws.places_begin is None else int(draws.places_begin)
        return [(b, int(one)) for one in places[:, shift + t + step]]
    return [divmod(int(one), L) for one in places[b, :, t]]


def by_definition(objective, z, c, draws, speakers=None):
    """Losses and accuracies of every step, from loops over sequences and frames, and how many keys are contrasted."""
    if objective.reverse:
        z, c = z.flip(2), c.flip(2)
    window = L if objective.subsample is None else min(L, objective.subsample)
    begin = 0 if draws.begin is None else int(draws.begin)
    losses, rights, logs = [], [], []
    for step in range(1, K + 1):
        terms, ranks, counts = [], [], []
        for b in range(len(z)):
            for t in range(window - (K if objective.common_positions else step)):
                prediction = objective.weight[step - 1] @ c[b, :, begin + t]
                places = negatives_of(objective, draws, len(z), step, b, t, window)
                if speakers is not None:
                    places = [place for place in places if speakers[place[0]] == speakers[b]]
                target = (b, begin + t + step)
                scores = torch.stack([prediction @ z[other, :, time] for other, time in [target, *places]])
                scores = scores / (D if objective.score == "mean" else 1)
                terms.append(-torch.log_softmax(scores, 0)[0])
                others = [score for score, place in zip(scores[1:], places, strict=True) if place != target]
                ranks.append(float(all(score < scores[0] for score in others)))
                counts.append(math.log(len(scores)))
        losses.append(torch.stack(terms).mean())
        rights.append(sum(ranks) / len(ranks))
        logs.append(sum(counts) / len(counts))
    return torch.stack(losses), torch.tensor(rights, dtype=torch.float64), sum(logs) / K


def check(objective, draws, speakers=None):
    z, c = sequences()
    output = objective(z, c, negatives=draws, speakers=speakers)
    losses, rights, logs = by_definition(objective, z, c, draws or SequenceNegatives(None), speakers)
    total = losses.mean() if objective.reduction == "mean" else losses.sum()
    torch.testing.assert_close(output.loss, total, **EXACT)
    torch.testing.assert_close(output.step_losses, losses.detach(), **EXACT)
    torch.testing.assert_close(output.step_accuracies, rights)
    torch.testing.assert_close(output.accuracy, rights.mean())
    torch.testing.assert_close(output.mutual_information, logs - losses.detach().mean(), atol=1e-6, rtol=0)
    variables = (z, c, objective.weight)
    expected = torch.autograd.grad(total, variables)
    for found, other in zip(torch.autograd.grad(output.loss, variables), expected, strict=True):
        torch.testing.assert_close(found, other, **EXACT)
    assert not any(value.requires_grad for value in output[1:])


@pytest.mark.parametrize("subsample", [None, 6])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("sampling", [*DRAWN, "all"])
def test_equals_definition(sampling, common, subsample):
    objective = make(sampling=sampling, common_positions=common, subsample=subsample, **DRAWN.get(sampling, {}))
    draws = objective.draw_negatives(torch.empty(B, D, L), generator())
    assert (draws is None) == (sampling == "all" and subsample is None)
    check(objective, draws)


@pytest.mark.parametrize("sampling", ["permuted", "shifted", "all"])
def test_only_the_same_speaker(sampling):
    objective = make(sampling=sampling, same_speaker=True)
    check(objective, objective.draw_negatives(torch.empty(B, D, L), generator()), torch.tensor([4, 1, 4]))


def test_the_other_options():
    objective = make(sampling="shifted", reverse=True, reduction="sum", score="mean", common_positions=True)
    check(objective, objective.draw_negatives(torch.empty(B, D, L), generator()))


@pytest.mark.parametrize("subsample", [None, 6])
@pytest.mark.parametrize("sampling", DRAWN)
def test_draws_follow_the_generator_and_can_be_used_again(sampling, subsample):
    objective = make(sampling=sampling, subsample=subsample, **DRAWN[sampling])
    z, c = sequences()
    first, same, other = (objective(z, c, generator=generator(seed)).loss for seed in (1, 1, 2))
    assert first == same
    assert first != other
    draws = objective.draw_negatives(z, generator(1))
    assert objective(z, c, negatives=draws).loss == first
    if subsample is None:
        assert objective(z, c, negatives=draws.places).loss == first
    for narrow in (torch.uint8, torch.int8, torch.int32):
        places = draws.places
        places = places.to(narrow) if isinstance(places, torch.Tensor) else [one.to(narrow) for one in places]
        assert objective(z, c, negatives=draws._replace(places=places)).loss == first
        if sampling == "permuted":
            speakers = torch.zeros(len(z), dtype=torch.int64)
            theirs = make(sampling=sampling, subsample=subsample, same_speaker=True, **DRAWN[sampling])
            results = [
                theirs(z, c, negatives=draws._replace(places=each), speakers=speakers)
                for each in (draws.places, places)
            ]
            assert results[0].loss == results[1].loss


def test_permutations_name_every_frame_once():
    draws = make().draw_negatives(torch.empty(B, D, L), generator())
    assert draws.begin is None
    assert torch.equal(draws.places.sort(1).values, torch.arange(B * L).expand(S, -1))
    assert len(draws.places.unique(dim=0)) == S
    draws = make(sampling="same-sequence", subsample=6).draw_negatives(torch.empty(B, D, L), generator())
    assert torch.equal(draws.places.sort(1).values, torch.arange(L).expand(S, -1))


def test_offsets_are_never_of_the_positive_and_reach_all_others():
    draws = make(sampling="offsets", neg_samples=200).draw_negatives(torch.empty(B, D, L), generator())
    assert [set(one.unique().tolist()) for one in draws.places] == [set(range(1, B * 8)), set(range(1, B * 7))]


@pytest.mark.parametrize("subsample", [None, 6])
@pytest.mark.parametrize("without", [False, True])
def test_shifted_frames_are_all_but_those_left_out(without, subsample):
    objective = make(sampling="shifted", neg_samples=2000, exclude_positive=without, subsample=subsample)
    draws = objective.draw_negatives(torch.empty(B, D, L), generator())
    begin = 0 if subsample is None else int(draws.begin)
    positions = (subsample or L) - 1
    assert draws.places.shape == (B, 2000, positions)
    for b in range(B):
        for t in range(positions):
            time = begin + t
            found, counts = draws.places[b, :, t].unique(return_counts=True)
            expected = {other * L + frame for other in range(B) for frame in range(L) if frame != time}
            if without:
                expected -= {b * L + (time + step) % L for step in range(1, K + 1)}
            assert set(found.tolist()) == expected
            # All alike: five standard deviations of a binomial around its mean.
            mean = 2000 / len(expected)
            assert (counts - mean).abs().max() < 5 * math.sqrt(mean)


def test_the_only_frame_that_is_left():
    objective = make(sampling="shifted", exclude_positive=True)
    places = objective.draw_negatives(torch.empty(1, D, K + 2), generator()).places
    assert torch.equal(places, (torch.arange(K + 1) + K + 1).remainder(K + 2).expand(1, S, -1))


def test_windows_begin_anywhere_but_at_the_very_end():
    objective = make(subsample=6)
    begins = {int(objective.draw_negatives(torch.empty(B, D, L), generator(seed)).begin) for seed in range(40)}
    assert begins == {0, 1, 2}
    short = make(subsample=L).draw_negatives(torch.empty(B, D, L), generator())
    assert short.begin is None


@pytest.mark.parametrize("sampling", ["permuted", "offsets", "same-sequence", "shifted", "all"])
def test_of_several_ranks_it_is_that_of_the_whole_batch(ranks, sampling):
    world = ranks.world
    z, c = sequences(2 * world)
    objective = make(sampling=sampling)
    draws = objective.draw_negatives(z, generator())
    expected = objective(z, c, negatives=draws)
    gradients = torch.autograd.grad(expected.loss, (z, c))
    names = ["gather", "ring"] if sampling == "all" else ["gather"]
    for name in names:
        objectives = [make(sampling=sampling, gather_negatives=name) for _ in range(world)]

        def program(rank, objectives=objectives):
            own = [value.detach().chunk(world)[rank].requires_grad_() for value in (z, c)]
            mine = objectives[rank]
            if draws is not None:
                again = mine.draw_negatives(own[0], generator())
                assert all(torch.equal(one, other) for one, other in zip(again.places, draws.places, strict=True))
            output = mine(*own, negatives=draws)
            return output.loss.detach(), output.mutual_information, torch.autograd.grad(output.loss, own)

        found = ranks.run(program)
        torch.testing.assert_close(sum(one[0] for one in found) / world, expected.loss, **EXACT)
        torch.testing.assert_close(sum(one[1] for one in found) / world, expected.mutual_information, **EXACT)
        for index, gradient in enumerate(gradients):
            together = torch.cat([one[2][index] for one in found]) / world
            torch.testing.assert_close(together, gradient, **EXACT)


def test_speakers_of_several_ranks(ranks):
    world = ranks.world
    z, c = sequences(2 * world)
    speakers = torch.arange(2 * world) % 2
    expected = make(sampling="all", same_speaker=True)(z, c, speakers=speakers).loss

    objectives = [make(sampling="all", same_speaker=True, gather_negatives="gather") for _ in range(world)]

    def program(rank):
        own = [value.chunk(world)[rank] for value in (z.detach(), c.detach(), speakers)]
        return objectives[rank](*own[:2], speakers=own[2]).loss.detach()

    torch.testing.assert_close(sum(ranks.run(program)) / world, expected, **EXACT)


@pytest.mark.parametrize("predictor", ["transformer", "ffd", "conv4", "conv8", "conv12", "lstm"])
@pytest.mark.parametrize("common", [False, True])
def test_predictors_see_no_context_to_come(predictor, common):
    objective = (
        make(predictor=predictor, common_positions=common, window=L).double()
        if predictor != "transformer"
        else (SequenceInfoNCE(8, pred_steps=K, predictor=predictor, common_positions=common, window=L).double().eval())
    )
    channels = objective.context_channels
    contexts = torch.randn(1, L - K, channels, dtype=torch.float64, generator=generator()).requires_grad_()
    assert len(objective.predictors) == K
    for network in objective.predictors:
        made = network(contexts)
        assert made.shape == (1, L - K, objective.encoding_channels)
        # Squared and weighted, as normalised values sum to zero.
        (slope,) = torch.autograd.grad(made[0, 3].square() @ torch.arange(made.shape[2]).double(), contexts)
        seen = slope[0].abs().sum(1) > 0
        first = {"ffd": 3, "conv4": 0, "conv8": 0, "conv12": 0}.get(predictor, 0)
        assert seen.tolist() == [first <= position <= 3 for position in range(L - K)]
    frames = torch.randn(2, 2, channels, L, dtype=torch.float64, generator=generator())
    encodings = torch.randn(2, objective.encoding_channels, L, dtype=torch.float64, generator=generator())
    output = objective(encodings, frames[0], generator=generator())
    # Each step has a network of its own, for the positions that the step has.
    draws = objective.draw_negatives(encodings, generator())
    keys = encodings.transpose(1, 2).flatten(0, 1)
    for step in range(1, K + 1):
        count = L - (K if common else step)
        made = objective.predictors[step - 1](frames[0].transpose(1, 2)[:, :count]).flatten(0, 1)
        targets = encodings.transpose(1, 2)[:, step : step + count].flatten(0, 1)
        others = keys[draws.places[:, -len(made) :]]
        scores = torch.cat([(made * targets).sum(1)[None], (made * others).sum(2)])
        expected = F.cross_entropy(scores.t(), torch.zeros(len(made), dtype=torch.int64))
        torch.testing.assert_close(output.step_losses[step - 1], expected, **EXACT)


def test_predictions_start_as_published():
    wide = SequenceInfoNCE(600, 40, pred_steps=3, start="cpc-audio").weight
    assert wide.shape == (3, 600, 40)
    torch.testing.assert_close(wide[:, :40].std(), torch.tensor(1.0), atol=0.05, rtol=0)
    torch.testing.assert_close(wide[:, 40:].std(), torch.tensor(0.01), atol=0.0005, rtol=0)
    for start, channels in (("uniform", 600), ("cpc-audio", 100)):
        plain = SequenceInfoNCE(channels, 100, pred_steps=3, start=start).weight.detach()
        assert 0.095 < plain.abs().max() <= 0.1
        torch.testing.assert_close(plain.std(), torch.tensor(0.1 / 3**0.5), atol=0.001, rtol=0)
    conv = SequenceInfoNCE(60, 50, pred_steps=1, predictor="conv4").predictors[0]
    torch.testing.assert_close(conv.weight.std(), torch.tensor(1.0), atol=0.05, rtol=0)
    made = conv(torch.randn(1, 4000, 50))
    # Equalised: the weights' variance of 1 becomes 2 / inputs.
    torch.testing.assert_close(made.std(), torch.tensor(2.0**0.5), atol=0.1, rtol=0)


def test_dropout_of_predictions():
    objective = make(dropout=0.5)
    z, c = sequences()
    plain = make()(z, c, generator=generator()).loss
    assert objective(z, c, generator=generator()).loss != plain
    assert objective.eval()(z, c, generator=generator()).loss == plain


@pytest.mark.parametrize("sampling", [*DRAWN, "all"])
def test_empty_batch(sampling):
    z, c = sequences(0)
    output = make(sampling=sampling)(z, c)
    output.loss.backward()
    assert output.loss == 0
    assert output.accuracy == 0


@pytest.mark.parametrize("subsample", [None, 6])
@pytest.mark.parametrize("sampling", [*DRAWN, "all"])
def test_nothing_is_made_on_another_device(sampling, subsample):
    objective = make(sampling=sampling, subsample=subsample, **DRAWN.get(sampling, {})).to("meta")
    z, c = (value.detach().to("meta") for value in sequences())
    draws = objective.draw_negatives(z)
    for output in (objective(z, c), objective(z, c, negatives=draws)):
        assert output.loss.device.type == "meta"
        assert output.step_losses.shape == (K,)


def test_half_precision_follows_autocast():
    z, c = sequences()
    objective = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(z.float(), c.float(), generator=generator())
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, make()(z, c, generator=generator()).loss.float(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"sampling": "random"}, "sampling must be one of permuted, "),
        ({"predictor": "rnn"}, "predictor must be one of linear, "),
        ({"predictor": "transformer"}, "transformer predictors need contexts as wide as encodings, got 4 and 5"),
        ({"reduction": "none"}, "reduction must be one of mean, sum"),
        ({"score": "cosine"}, "score must be one of dot, mean"),
        ({"start": "zero"}, "start must be one of"),
        ({"pred_steps": 0}, "pred_steps must be at least 1"),
        ({"neg_samples": 0}, "neg_samples must be at least 1"),
        ({"subsample": 2}, "subsample must be at least 3"),
        ({"window": 2}, "window must be at least 3"),
        ({"exclude_positive": True}, "exclude_positive is for"),
        ({"gather_negatives": "ring"}, 'needs sampling="all"'),
        ({"gather_negatives": "ring", "sampling": "all", "same_speaker": True}, 'needs sampling="all"'),
        ({"gather_negatives": "some"}, "gather_negatives must be one of"),
    ],
)
def test_wrong_settings(options, problem):
    with pytest.raises(ValueError, match=problem):
        make(**options)


def test_wrong_arguments():
    z, c = sequences()
    objective = make()
    for given, problem in (
        ((c, c), r"encodings must be \[B, 5 channels, L\]"),
        ((z, z), r"contexts must be \[B, 4 channels, L\]"),
        ((z, c[:, :, :-1]), "batch and length"),
        ((z[:2], c), "batch and length"),
        ((z[..., :2], c[..., :2]), "2 frames is too short to predict pred_steps=2 ahead: it needs more than 2"),
    ):
        with pytest.raises(ValueError, match=problem):
            objective(*given)
    with pytest.raises(ValueError, match="speakers are for same_speaker"):
        objective(z, c, speakers=torch.zeros(B, dtype=torch.int64))
    with pytest.raises(ValueError, match="same_speaker needs speakers"):
        make(same_speaker=True)(z, c)
    for wrong, message in ((torch.zeros(3), "integers, got torch.float32"), ([0, 1, 2], "a tensor, got list")):
        with pytest.raises(TypeError, match=f"speakers must be {message}"):
            make(same_speaker=True)(z, c, speakers=wrong)
    with pytest.raises(TypeError, match="encodings must be a tensor, got NoneType"):
        objective(None, c)
    with pytest.raises(TypeError, match=r"contexts must be floating, got torch\.int64"):
        objective(z, c.long())
    with pytest.raises(ValueError, match=r"speakers must be integers \[3\]"):
        make(same_speaker=True)(z, c, speakers=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shapes \[\(6, 27\)\] where sampling is 'permuted', got \[\(6, 26\)\]"):
        objective(z, c, negatives=torch.zeros(S, B * L - 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \[\]"):
        objective(z, c, negatives=SequenceNegatives(None))
    with pytest.raises(ValueError, match="where the window of 6 of 9 frames begins"):
        make(subsample=6)(z, c, negatives=torch.zeros(S, B * L, dtype=torch.int64))
    begin = torch.zeros(1, dtype=torch.int64)
    places = torch.zeros(S, L, dtype=torch.int64)
    with pytest.raises(ValueError, match="where the window of 6 of 9 frames begins"):
        make(subsample=6, sampling="same-sequence")(z, c, negatives=SequenceNegatives(places, begin))
    with pytest.raises(TypeError, match=r"negatives must be integers, got torch\.float32"):
        objective(z, c, negatives=torch.zeros(S, B * L))
    with pytest.raises(ValueError, match="exclude_positive leaves none of 3 frames of 1 sequences"):
        make(sampling="shifted", exclude_positive=True)(z[:1, :, :3], c[:1, :, :3])
    with pytest.raises(IndexError):
        objective(z, c, negatives=torch.full((S, B * L), B * L))
