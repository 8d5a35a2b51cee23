"""info_nce on arguments that Hypothesis makes up; conftest.py tells how."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from cpc_ext.ops import info_nce
from tests.ops.properties.conftest import *


@dataclass(frozen=True)
class Contrast:
    """Arguments of info_nce, tensors as layouts."""

    dtypes: tuple[torch.dtype, torch.dtype]
    values: Callable
    queries: Layout
    keys: Layout
    targets: Layout | None
    negatives: Layout | None
    exclude: Layout | None
    weights: Layout | None
    index_dtype: torch.dtype
    weights_dtype: torch.dtype
    no_weight: bool
    scale: float
    reduction: str


@st.composite
def contrasts(draw) -> Contrast:
    batch = draw(st.sampled_from([(), (), (1,), (2,), (2, 2), (0,), (2, 0)]))
    num_queries, num_keys, dim, samples = (draw(st.integers(low, 5)) for low in (0, 1, 0, 0))
    if num_queries == 0:
        num_keys = draw(st.integers(0, 5))
    rows = (*batch, num_queries)
    return Contrast(
        dtypes=draw(st.tuples(st.sampled_from(FLOATING), st.sampled_from(FLOATING))),
        values=draw(st.sampled_from([normal, small_integers])),
        queries=draw(layouts((*rows, dim))),
        keys=draw(layouts((*batch, num_keys, dim))),
        targets=draw(layouts(rows) if num_queries > num_keys else st.none() | layouts(rows)),
        negatives=draw(st.none() | layouts((*rows, samples))),
        exclude=draw(st.none() | layouts(rows)),
        weights=draw(st.none() | layouts(rows)),
        index_dtype=draw(st.sampled_from(INTEGERS)),
        weights_dtype=draw(st.sampled_from(FLOATING)),
        no_weight=draw(st.integers(0, 5)) == 5,
        scale=draw(st.floats(-2, 2, width=16) | st.integers(-2, 2)),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )


def row_by_row(queries, keys, targets, negatives, exclude, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and margins [M] of [M, D] queries: a softmax a row. The margin is that of the positive's score above all
    others'. Last, the largest absolute value of what is summed to a score."""
    losses, margins, largest = [], [], [torch.zeros((), dtype=torch.float64)]
    for m, query in enumerate(queries):
        target = int(targets[m])
        contrasted = range(len(keys)) if negatives is None else [target, *negatives[m].tolist()]
        contrasted = [n for n in contrasted if exclude is None or n != int(exclude[m])]
        scores = torch.stack([scale * (query * keys[n]).sum() for n in contrasted])
        positive = scale * (query * keys[target]).sum()
        losses.append(-(torch.exp(positive - scores.max()) / torch.exp(scores - scores.max()).sum()).log())
        others = [scores[i].detach() for i, n in enumerate(contrasted) if n != target]
        margins.append(min((positive.detach() - other for other in others), default=positive.new_tensor(math.inf)))
        largest += [abs(scale) * (query * keys[n]).detach().abs().sum() for n in contrasted]
    empty = queries.new_zeros(0)
    return torch.stack(losses) if losses else empty, torch.stack(margins) if margins else empty, max(largest)


def test_info_nce_and_its_gradients_are_softmaxes_of_rows(device, for_examples):
    @for_examples(case=contrasts())
    def holds(case: Contrast):
        queries, dense_queries = case.queries.place(device, case.dtypes[0], case.values)
        keys, dense_keys = case.keys.place(device, case.dtypes[1], case.values)
        queries, keys = queries.detach().requires_grad_(), keys.detach().requires_grad_()
        dense_queries, dense_keys = (dense.double().requires_grad_() for dense in (dense_queries, dense_keys))
        *batch, num_queries, dim = dense_queries.shape
        num_keys = dense_keys.shape[-2]
        options, plain = {}, {"exclude": None, "negatives": None}
        for name in ("targets", "negatives", "exclude"):
            layout = getattr(case, name)
            if layout is not None:
                # A key that the query is not contrasted with must not be its positive: these have halves of their own.
                low, high = {"targets": (0, (num_keys + 1) // 2), "exclude": ((num_keys + 1) // 2, num_keys)}.get(
                    name, (0, num_keys)
                )
                assume(low < high or math.prod(layout.shape) == 0)
                drawn = integers_below(high - low)
                options[name], plain[name] = layout.place(
                    device, case.index_dtype, lambda n, generator, drawn=drawn, low=low: drawn(n, generator) + low
                )
                plain[name] = plain[name].to(torch.int64)
        if case.targets is None:
            plain["targets"] = torch.arange(num_queries).expand(*batch, num_queries)
            assume(case.exclude is None or not bool((plain["exclude"] == plain["targets"]).any()))
        weights = torch.ones(*batch, num_queries, dtype=torch.float64)
        if case.weights is not None:
            options["weights"], dense_weights = case.weights.place(
                device, case.weights_dtype, lambda n, g: integers_below(4)(n, g) * (not case.no_weight) / 2
            )
            weights = dense_weights.double()

        loss, accuracy = info_nce(queries, keys, scale=case.scale, reduction=case.reduction, **options)
        dtype = torch.float64 if torch.float64 in case.dtypes else torch.float32
        assert loss.dtype == accuracy.dtype == dtype

        entries = math.prod(batch)
        flat = {
            name: None if value is None else value.reshape(entries, *value.shape[len(batch) :])
            for name, value in plain.items()
        }
        flat_queries = dense_queries.reshape(entries, num_queries, dim)
        flat_keys = dense_keys.reshape(entries, num_keys, dim)
        outcomes = [
            row_by_row(
                flat_queries[b],
                flat_keys[b],
                **{name: None if value is None else value[b] for name, value in flat.items()},
                scale=case.scale,
            )
            for b in range(entries)
        ]
        rows = (*batch, num_queries)
        losses = torch.stack([outcome[0] for outcome in outcomes]).view(rows) if outcomes else weights * 0
        margins = torch.stack([outcome[1] for outcome in outcomes]).view(rows) if outcomes else weights * 0
        largest = max((float(outcome[2]) for outcome in outcomes), default=0.0)
        total = weights.sum() if bool(weights.sum() > 0) else torch.ones(())
        expected = weights * losses
        if case.reduction != "none":
            expected = expected.sum() / (total if case.reduction == "mean" else 1)
        bound = 4 * TOLERANCE[dtype] * (1 + largest) * (1 + weights.sum())
        assert_within(loss, expected, bound)

        rights = (margins > 0).double()
        # Small integers have exact scores and ties; of others a tie may round either way.
        unclear = (margins.abs() <= bound) if case.values is normal else torch.zeros_like(rights)
        if case.reduction == "none":
            assert_within(accuracy, rights, unclear.double())
        else:
            assert_within(
                accuracy, (weights * rights).sum() / total, TOLERANCE[dtype] + (weights * unclear).sum() / total
            )

        assert not accuracy.requires_grad
        actual = torch.autograd.grad(loss.sum(), (queries, keys))
        expected = torch.autograd.grad(
            expected.sum() + 0 * (dense_queries.sum() + dense_keys.sum()), (dense_queries, dense_keys)
        )
        for one, other, own in zip(actual, expected, case.dtypes, strict=True):
            assert one.dtype == own
            # The slopes of a loss are sums of keys or queries, of up to 5, whose weights are as inexact as the loss.
            assert_within(one, other, TOLERANCE[own] * (1 + other.abs()) + 20 * bound)


def test_indices_name_keys(device, request, for_examples):
    """Any 64-bit numbers: an IndexError on the CPU where they name no key, a NaN loss elsewhere."""
    on_cpu = request.node.callspec.params["device"] == "cpu"

    @for_examples(
        num_keys=st.integers(1, 4),
        targets=st.lists(st.integers(0, 3), min_size=3, max_size=3),
        name=st.sampled_from(["targets", "negatives", "exclude"]),
        value=st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1),
        at=st.integers(0, 2),
    )
    def holds(num_keys, targets, name, value, at):
        targets = torch.tensor(targets).clamp(max=num_keys - 1)
        indices = {"targets": targets, "negatives": targets[:, None], "exclude": (targets + 1) % num_keys}
        if name != "exclude" or num_keys == 1:
            del indices["exclude"]
        assume(name in indices)
        indices[name] = indices[name].clone()
        indices[name].view(-1)[at] = value
        generator = torch.Generator().manual_seed(0)
        queries, keys = normal(3 * 2, generator).view(3, 2), normal(num_keys * 2, generator).view(num_keys, 2)

        def contrast(indices, **options):
            tensors = {name: on(device, value) for name, value in indices.items()}
            return info_nce(queries.to(device), keys.to(device), **tensors, **options)

        names_no_key = not 0 <= value < num_keys
        names_positive = name == "exclude" and value == targets[at]
        if on_cpu and names_no_key:
            with pytest.raises(IndexError, match=f"{name} must be in"):
                contrast(indices)
        elif on_cpu and names_positive:
            with pytest.raises(ValueError, match="exclude must not name the positive"):
                contrast(indices)
        else:
            others = {key: tensor.clone() for key, tensor in indices.items()}
            if names_no_key or names_positive:
                others[name].view(-1)[at] = -1 if name == "exclude" else 0
            losses, *_ = row_by_row(queries, keys, scale=1.0, **{"negatives": None, "exclude": None} | others)
            if names_no_key or names_positive:
                losses[at] = math.nan
            assert_within(contrast(indices, reduction="none").loss, losses, 1e-12)


WRONG_CONTRAST_ARGUMENTS = {
    "queries": st.none()
    | NOT_TENSORS
    | other_layouts((3, 2), torch.float32)
    | tensors(
        (3, 2),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e4m3fn],
        fits=lambda shape: len(shape) >= 2,
        leads=True,
    ),
    "keys": st.none()
    | NOT_TENSORS
    | other_layouts((4, 2), torch.float32)
    | tensors(
        (4, 2),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e5m2],
        fits=lambda shape: len(shape) == 2 and shape[0] >= 3 and shape[1] == 2,
    ),
    "targets": NOT_TENSORS | other_layouts((3,), torch.int64) | tensors((3,), torch.int64, NOT_INDICES),
    "negatives": NOT_TENSORS
    | other_layouts((3, 2), torch.int64)
    | tensors((3, 2), torch.int64, NOT_INDICES, fits=lambda shape: len(shape) == 2 and shape[0] == 3),
    "exclude": NOT_TENSORS | other_layouts((3,), torch.int64) | tensors((3,), torch.int64, NOT_INDICES),
    "weights": NOT_TENSORS
    | other_layouts((3,), torch.float32)
    | tensors((3,), torch.float32, [*INTEGERS, torch.bool, torch.complex64]),
    "scale": st.none() | NOT_NUMBERS | st.sampled_from([True, math.inf, -math.inf, math.nan, ENORMOUS, -ENORMOUS]),
    "reduction": st.sampled_from([None, "", "max", "MEAN", 1, [], {}, torch.zeros(3), object()]),
}


def test_wrong_arguments_of_info_nce(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_CONTRAST_ARGUMENTS))
    def holds(wrong):
        arguments = {"queries": torch.zeros(3, 2), "keys": torch.zeros(4, 2)} | wrong
        with refused(*wrong):
            info_nce(**{name: on(device, value) for name, value in arguments.items()})


def test_weights_are_not_negative(for_examples):
    @for_examples(weight=st.floats(width=32), dtype=st.sampled_from(FLOATING))
    def holds(weight, dtype):
        weights = torch.tensor([1.0, weight]).to(dtype)
        if bool(weights[1] < 0):
            with pytest.raises(ValueError, match="weights must not be negative"):
                info_nce(torch.eye(2), torch.eye(2), weights=weights)
        else:
            loss = info_nce(torch.eye(2), torch.eye(2), weights=weights, reduction="none").loss
            torch.testing.assert_close(loss, weights.float() * loss[0], equal_nan=True)


def test_any_finite_scale_is_taken(for_examples):
    @for_examples(scale=st.integers(-(10**300), 10**300) | st.floats(allow_nan=False))
    def holds(scale):
        queries, keys = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        if math.isfinite(scale):
            loss = info_nce(queries, keys, scale=scale).loss
            expected = torch.nn.functional.softplus(torch.tensor(float(scale), dtype=torch.float64), threshold=40)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        else:
            with pytest.raises(ValueError, match="scale must be finite"):
                info_nce(queries, keys, scale=scale)
