"""The learner of one part of a model: effects of an update on gradients and weights, and devices."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from torch import nn

from cpc_ext.training.config import validate_config
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.learner import Learner
from cpc_ext.training.meter import FiniteGuard
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Handover

CPU = torch.device("cpu")
# Gradients of two weights, a unit apart in size, and their norm together.
GRADIENTS = (3.0, 0.25)
NORM = math.hypot(*GRADIENTS)


class TwoWeights(nn.Module):
    """loss = Σ weight · gradient."""

    def __init__(self, gradients: tuple[float, float] = GRADIENTS) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.tensor([5.0])) for _ in gradients)
        self.idle = nn.Parameter(torch.tensor([5.0]))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.gradients = gradients
        self.seen: list[tuple[object, ...]] = []

    def forward(self, given, labels, streams):
        self.seen.append((given, labels, streams, torch.is_autocast_enabled("cpu")))
        loss = sum((w * g).sum() for w, g in zip(self.weights, self.gradients, strict=True))
        return {"loss": loss, "other": torch.tensor(7.0)}, Handover(given.features + 1, "draws")


def learner_of(
    part: nn.Module, *, precision: str = "fp32", index: int = 0, ranks: Ranks | None = None, **optimization: object
) -> Learner:
    config = validate_config(
        {
            "cpc": {"pred_steps": 2},
            "optimization": {"steps": 9, **optimization},
            "compute": {"precision": precision},
        }
    )
    return Learner(index, part, config, ranks or Ranks(CPU))


def update(learner: Learner, *, step: int = 1, rate: float = 0.5, guard: FiniteGuard | None = None):
    return learner.update(
        step,
        Handover(torch.zeros(1)),
        torch.tensor([4]),
        RandomStreams(0, CPU),
        learning_rate=rate,
        guard=FiniteGuard(CPU) if guard is None else guard,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("limit", "kept"), [(None, 1.0), (0.5, 0.5 / NORM), (100.0, 1.0)])
def test_gradients_of_all_parameters_are_cut_together_after_unscaling(precision, limit, kept):
    part = TwoWeights()
    learner = learner_of(part, precision=precision, clip_grad=limit)
    for _ in range(2):  # The second adds nothing to the first.
        values, _ = update(learner)
        found = [weight.grad.item() for weight in part.weights]
        assert found == pytest.approx([kept * gradient for gradient in GRADIENTS], rel=1e-5)
        assert values["grad_norm"].item() == pytest.approx(NORM, rel=1e-5)


def test_adam_where_weights_do_not_decay():
    """Its first update is the learning rate in the direction of every gradient, whatever its size."""
    part = TwoWeights()
    update(learner_of(part), rate=0.5)
    assert [weight.item() for weight in part.weights] == pytest.approx([4.5, 4.5], rel=1e-5)
    assert part.idle.item() == part.frozen.item() == 5.0


def test_weights_decay_by_a_share_of_the_learning_rate():
    """AdamW: besides Adam's update the weight loses lr · decay of itself; a gradient of it would change nothing."""
    part = TwoWeights()
    update(learner_of(part, weight_decay=0.1), rate=0.5)
    expected = 5 * (1 - 0.5 * 0.1) - 0.5
    assert [weight.item() for weight in part.weights] == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_update_has_the_learning_rate_that_it_is_told(decay):
    part = TwoWeights()
    learner = learner_of(part, weight_decay=decay, lr=3.0)
    value = 5.0
    for number, rate in enumerate((0.25, 1.0, 0.5), 1):
        update(learner, step=number, rate=rate)
        value = value * (1 - rate * decay) - rate
        assert part.weights[0].item() == pytest.approx(value, rel=1e-5)


def test_what_a_part_is_given_and_hands_on():
    part = TwoWeights()
    learner = learner_of(part, index=2)
    assert (learner.index, learner.part) == (2, part)
    assert {id(parameter) for parameter in learner.parameters} == {id(p) for p in (*part.weights, part.idle)}
    values, handed = update(learner)
    ((given, labels, streams, autocast),) = part.seen
    assert (given.features.item(), labels.item(), autocast) == (0.0, 4, False)
    assert isinstance(streams, RandomStreams)
    assert set(values) == {"loss", "other", "grad_norm"}
    assert values["other"].item() == 7.0
    assert (handed.features.item(), handed.draws) == (1.0, "draws")
    update(learner_of(part, precision="bf16"))
    assert part.seen[-1][-1]


@pytest.mark.parametrize(("gradients", "bad"), [((math.inf, 1.0), True), ((1.0, 1.0), False)])
def test_a_gradient_that_is_not_finite_is_remembered(gradients, bad):
    guard = FiniteGuard(CPU)
    update(learner_of(TwoWeights(gradients)), step=6, guard=guard)
    assert guard.first_bad_step() == (6 if bad else None)


def test_a_gradient_may_be_infinite_where_the_loss_is_not():
    class Root(TwoWeights):
        def forward(self, given, labels, streams):
            return {"loss": self.weights[0].sqrt().sum()}, given

    part, guard = Root(), FiniteGuard(CPU)
    nn.init.zeros_(part.weights[0])
    values, _ = update(learner_of(part), step=3, guard=guard)
    assert values["loss"].item() == 0
    assert guard.first_bad_step() == 3


def test_loss_scaling_overflows_without_an_update():
    """Such a gradient is expected: the weights stay, and the next step has a smaller factor."""
    part, guard = TwoWeights((1e38, 1.0)), FiniteGuard(CPU)
    part.gradients = (1e37, 1.0)
    learner = learner_of(part, precision="fp16")
    before = learner.state_dict()["scaler"]["scale"]
    with torch.no_grad():
        for weight in part.weights:
            weight.fill_(1e-3)
    update(learner, guard=guard)
    assert [weight.item() for weight in part.weights] == pytest.approx([1e-3] * 2)
    assert learner.state_dict()["scaler"]["scale"] == before / 2
    assert guard.first_bad_step() is None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_state_goes_on(precision):
    """Adam's moments and the factor of the loss are those of the other learner."""
    learners = [learner_of(TwoWeights(), precision=precision) for _ in range(2)]
    first, second = learners
    for _ in range(3):
        update(first)
    second.part.load_state_dict(first.part.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict()["optimizer"]["state"][1]["step"].item() == 3
    assert second.state_dict()["scaler"] == first.state_dict()["scaler"]
    for learner in learners:
        learner.part.gradients = (-1.0, 2.0)
        update(learner)
    for one, other in zip(first.part.weights, second.part.weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("exp_avg", torch.ones(2), r"expected exp_avg \[1\], got \[2\]"),
        ("step", torch.ones(1), r"expected step \[\], got \[1\]"),
    ],
)
def test_states_of_another_part_are_refused(name, value, said):
    learner = learner_of(TwoWeights())
    update(learner)
    state = copy.deepcopy(learner.state_dict())
    learner.load_state_dict(copy.deepcopy(state))
    state["optimizer"]["state"][1][name] = value
    with pytest.raises(ValueError, match=f"^optimizer: {said}$"):
        learner.load_state_dict(state)


def test_what_is_no_number_is_no_scaler():
    learner = learner_of(TwoWeights(), precision="fp16")
    state = learner.state_dict()
    for value in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="scaler: expected numbers"):
            learner.load_state_dict({**state, "scaler": {**state["scaler"], "scale": value}})


def test_the_options_of_the_optimizer_are_those_of_this_run():
    state = learner_of(TwoWeights(), weight_decay=0.5, lr=0.1).state_dict()
    learner = learner_of(TwoWeights(), weight_decay=0.25, lr=0.2)
    learner.load_state_dict(state)
    (group,) = learner.state_dict()["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["lr"], group["fused"]) == (0.25, 0.2, True)


def test_the_optimizer_is_fused_so_that_overflows_do_not_wait_for_the_host():
    for decay in (0.0, 0.1):
        (group,) = learner_of(TwoWeights(), weight_decay=decay).state_dict()["optimizer"]["param_groups"]
        assert (group["fused"], group["weight_decay"]) == (True, decay)


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_what_is_shared_is_gradients_and_no_buffers(monkeypatch, name):
    """PyTorch calls the option one or the other; with a single process there is nothing around the part."""
    made = []

    class Wrapped(nn.Module):
        def __init__(self, module, **options):
            super().__init__()
            made.append((module, options))

    parameters = [inspect.Parameter("module", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)]
    Wrapped.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr("cpc_ext.training.learner.DistributedDataParallel", Wrapped)
    learner_of(TwoWeights())
    assert made == []
    part = TwoWeights()
    learner_of(part, ranks=Ranks(CPU, rank=1, world_size=2))
    assert made == [(part, {name: False})]
    learner_of(part, ranks=Ranks(CPU, rank=1, world_size=2, pipeline=True))  # Each has a part and whole batches.
    assert len(made) == 1
