"""Parts of a step besides the model: learning rate, number format, random numbers, running means and averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cpc_ext.data import BatchShare
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.meter import FiniteGuard, Meter
from cpc_ext.training.precision import autocast, check_device, grad_scaler, patch_dtype
from cpc_ext.training.random_streams import RandomStreams, seeded
from cpc_ext.training.schedule import learning_rate
from cpc_ext.training.weight_average import WeightAverage, averaged_weights

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# The learning rate.


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_learning_rate_is_the_plain_formula(warmup, floor):
    def rate(step, schedule):
        return learning_rate(step, peak=3.0, total_steps=20, warmup_steps=warmup, schedule=schedule, floor=floor)

    for step in range(1, 21):
        rising = 3.0 * step / max(warmup, 1)
        turn = math.cos(math.pi * (step - warmup - 1) / (20 - warmup))
        cosine = 3.0 * floor + (3.0 - 3.0 * floor) * (1 + turn) / 2
        assert rate(step, "constant") == pytest.approx(rising if step <= warmup else 3.0, rel=1e-12)
        assert rate(step, "cosine") == pytest.approx(rising if step <= warmup else cosine, rel=1e-12)


def test_learning_rate_past_the_end_stays_at_the_floor():
    rates = [
        learning_rate(step, peak=2.0, total_steps=5, warmup_steps=0, schedule="cosine", floor=0.1)
        for step in (6, 7, 9, 100)
    ]
    assert rates == pytest.approx([0.2] * 4, rel=1e-12)
    # Nothing is left after a warm-up that is longer than the run.
    assert learning_rate(9, peak=2.0, total_steps=4, warmup_steps=8, schedule="cosine") == 2.0
    assert learning_rate(10, peak=2.0, total_steps=4, warmup_steps=8, schedule="cosine") == 0.0
    assert learning_rate(1, peak=2.0, total_steps=1, warmup_steps=0, schedule="cosine", floor=0.5) == 2.0


def test_the_floor_is_zero_unless_given():
    assert learning_rate(6, peak=2.0, total_steps=5, warmup_steps=0, schedule="cosine") == 0.0


# Number formats.


@pytest.mark.filterwarnings("error")  # As PyTorch gives where autocast is asked for float32.
@pytest.mark.parametrize("name", DTYPES)
def test_number_formats(name):
    assert patch_dtype(name) == DTYPES[name]
    with autocast(CPU, name):
        assert torch.is_autocast_enabled("cpu") == (name != "fp32")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == DTYPES[name]
    assert not torch.is_autocast_enabled("cpu")
    assert grad_scaler(CPU, name).is_enabled() == (name == "fp16")


def test_devices_that_are_there_and_not():
    assert check_device("cpu") == CPU
    with pytest.raises(TrainingError, match=r"^--device cuda:99 is not available here \(.+\); --device cpu always is$"):
        check_device("cuda:99")


# Random numbers.


def test_streams_are_those_of_their_seeds():
    """The two of a seed, and those of neighbouring seeds, are four different ones."""
    first, second = RandomStreams(3, CPU), RandomStreams(4, CPU)
    seeds = [stream.initial_seed() for each in (first, second) for stream in (each.views, each.negatives)]
    assert seeds == [6, 7, 8, 9]
    assert (first.share, first.negatives.device) == (BatchShare(), CPU)
    share = BatchShare(1, 2)
    assert RandomStreams(0, CPU, share).share is share


def test_layers_of_each_process_draw_numbers_of_their_own():
    """Neither those of another process, whose rows are others, nor those that crops are made of."""
    drawn = []
    for rank in (0, 1):
        streams = RandomStreams(0, CPU, BatchShare(rank, 2), rank=rank)
        drawn += [torch.rand(4), torch.rand(4, generator=streams.views), torch.rand(4, generator=streams.negatives)]
    assert torch.equal(drawn[1], drawn[4])
    assert torch.equal(drawn[2], drawn[5])
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4


def test_each_process_goes_on_with_its_own_numbers():
    own = []
    expected = []
    for rank in (0, 1):
        streams = RandomStreams(3, CPU, BatchShare(rank, 2), rank=rank)
        torch.rand(5)
        state = streams.state_dict(lambda mine: own.append(mine) or own)
        expected.append(torch.rand(3))
    for rank in (0, 1, 2):
        resumed = RandomStreams(3, CPU, BatchShare(rank, 3), rank=rank)
        fresh = torch.get_rng_state()
        resumed.load_state_dict(state)
        if rank < 2:
            assert torch.equal(torch.rand(3), expected[rank])
        else:
            assert torch.equal(torch.get_rng_state(), fresh)


def test_a_checkpoint_of_before_has_the_numbers_of_the_first_process():
    streams = RandomStreams(3, CPU)
    state = streams.state_dict()
    state |= state.pop("own")[0]
    expected = torch.rand(3)
    streams.load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)


def test_seeded_numbers_leave_a_gpus_generators_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    before = torch.get_rng_state()
    with seeded(7):
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_another_kind_of_device_draw_negatives_anew():
    streams = RandomStreams(5, CPU)
    state = streams.state_dict()
    assert (state["device"], state["own"][0]["torch_device"]) == ("cpu", None)
    expected = [torch.rand(3, generator=streams.views), torch.rand(3)]
    other = RandomStreams(6, CPU)
    negatives = other.negatives.get_state()
    other.load_state_dict({**state, "device": "cuda", "negatives": None})
    assert torch.equal(other.negatives.get_state(), negatives)
    assert all(map(torch.equal, expected, [torch.rand(3, generator=other.views), torch.rand(3)]))


def test_streams_keep_what_a_gpus_own_layers_draw(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: kept.append((state, device)))
    streams = RandomStreams(5, CPU)
    monkeypatch.setattr(streams, "_device", torch.device("cuda:1"))
    state = streams.state_dict()
    assert (state["device"], state["own"][0]["torch_device"]) == ("cuda", "of cuda:1")
    streams.load_state_dict(state)
    assert kept == [("of cuda:1", torch.device("cuda:1"))]
    streams.load_state_dict({**state, "device": "cpu"})
    assert len(kept) == 1


# Means.


def test_meter_means_are_of_the_steps_since_the_last_reset():
    meter = Meter(CPU)
    value = torch.tensor(1.0, requires_grad=True)
    meter.add({"loss": value})
    with torch.no_grad():
        value.fill_(100.0)  # As a CUDA graph does with the memory of the step before.
    meter.add({"loss": torch.tensor(4, dtype=torch.int64)})
    meter.add({"loss": torch.tensor(7.0, dtype=torch.float16)})
    assert (meter.count, meter.means()) == (3, {"loss": 4.0})
    state = meter.state_dict()
    assert state["count"] == 3
    assert not state["sums"]["loss"].requires_grad
    meter.reset()
    assert (meter.count, meter.means()) == (0, {})
    assert state["sums"]["loss"].item() == 12.0  # A state that was taken stays.
    meter.load_state_dict(state)
    meter.add({"loss": torch.tensor(0.0)})
    assert (meter.count, meter.means()) == (4, {"loss": 3.0})


def test_meter_states_come_from_any_device_and_type():
    meter = Meter(torch.device("meta"))
    meter.load_state_dict({"sums": {"loss": torch.ones(1, dtype=torch.float64)}, "count": 0})
    (value,) = meter.state_dict()["sums"].values()
    assert (value.device.type, value.dtype, value.shape) == ("meta", torch.float32, ())
    for count in (-1, 1.0, True):
        with pytest.raises(TypeError, match=f"expected a number of steps, got {count}"):
            meter.load_state_dict({"sums": {}, "count": count})


def test_finite_guard_watches_every_value_and_element():
    for values in ([math.nan, 1.0], [1.0, -math.inf]):
        guard = FiniteGuard(CPU)
        guard.watch(0, torch.tensor(1.0), torch.tensor([1.0, 2.0]))
        assert guard.first_bad_step() is None
        guard.watch(5, torch.tensor(1.0), torch.tensor(values))
        assert guard.first_bad_step() == 5
        guard.watch(6, torch.tensor(math.nan))
        assert guard.first_bad_step() == 5
    assert FiniteGuard(torch.device("meta"))._first.device.type == "meta"
    guard = FiniteGuard(CPU)
    guard.watch(0, torch.tensor(math.nan))
    guard.watch(1, torch.tensor(math.nan))
    assert guard.first_bad_step() == 0


# Averages of the weights.


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_average_forgets_faster_at_first(decay):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    average = WeightAverage(model, decay)
    expected = 0.0
    for number, value in enumerate((1.0, -2.0, 5.0), 1):
        nn.init.constant_(model.weight, value)
        average.update(model)
        kept = min(decay, (1 + number) / (10 + number))
        expected = kept * expected + (1 - kept) * value
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-6)
        assert model.weight.item() == value
    assert not average.model.training
    assert not average.model.weight.requires_grad


def test_average_goes_on_where_it_was():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.9)
    for value in (1.0, 4.0):
        nn.init.constant_(model.weight, value)
        average.update(model)
    state = average.state_dict()
    other = WeightAverage(nn.BatchNorm1d(2), 0.9)
    other.load_state_dict(state)
    for each in (average, other):
        each.update(model)
    assert torch.equal(average.model.weight, other.model.weight)
    assert averaged_weights(state).keys() == model.state_dict().keys()
    assert averaged_weights({"step": 3}) == {}
    with pytest.raises(KeyError):
        other.load_state_dict({})


def test_average_of_no_updates_is_one_and_other_numbers_are_none():
    average = WeightAverage(nn.Linear(1, 1), 0.9)
    state = average.state_dict()
    average.load_state_dict(state)
    assert average.state_dict()["average_updates"] == 0
    for number in (-1, 1.0, True):
        with pytest.raises(TypeError, match=f"expected a number of updates, got {number}"):
            average.load_state_dict({**state, "average_updates": number})
