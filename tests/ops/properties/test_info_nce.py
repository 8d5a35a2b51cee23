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
from tests.ops.contrast.by_hand import contrast_by_hand
from tests.ops.contrast.draw import reduced
from tests.ops.properties.conftest import *


@dataclass(frozen=True)
class Contrast:
    """Arguments of info_nce, tensors as layouts."""

    dtypes: tuple[torch.dtype, torch.dtype]
    values: Callable
    queries: Layout
    keys: Layout | None  # None: the queries are their own keys.
    targets: Layout | None
    negatives: Layout | None
    exclude: Layout | None
    key_range: bool
    key_bias: Layout | None
    groups: tuple[Layout, Layout] | None
    contrast: str
    symmetric: bool
    weights: Layout | None
    index_dtype: torch.dtype
    bias_dtype: torch.dtype
    weights_dtype: torch.dtype
    no_weight: bool
    scale: float | Tensor
    reduction: str


@st.composite
def contrasts(draw) -> Contrast:
    batch = draw(st.sampled_from([(), (), (1,), (2,), (2, 2), (0,), (2, 0)]))
    num_queries, num_keys, dim, samples = (draw(st.integers(low, 6)) for low in (0, 1, 0, 0))
    symmetric = draw(st.integers(0, 4)) == 4
    alone = draw(st.integers(0, 4)) == 4
    if symmetric or (alone and num_queries):
        num_keys = num_queries
    elif num_queries == 0:
        num_keys = draw(st.integers(0, 5))
    rows, of_keys = (*batch, num_queries), (*batch, num_keys)
    indices = st.one_of(st.none(), layouts(rows), *(layouts((*rows, places)) for places in (2, 3, 0)))
    contrast = draw(st.sampled_from(["all", "all", "same", "other"]))
    targets = st.none() if symmetric else indices
    if num_queries > num_keys:
        targets = targets.filter(lambda layout: layout is not None)
    scale = draw(st.floats(-2, 2, width=16) | st.integers(-2, 2))
    if draw(st.booleans()):
        scale = torch.tensor(scale, dtype=draw(st.sampled_from(FLOATING)), requires_grad=draw(st.booleans()))
    return Contrast(
        dtypes=draw(st.tuples(st.sampled_from(FLOATING), st.sampled_from(FLOATING))),
        values=draw(st.sampled_from([normal, small_integers])),
        queries=draw(layouts((*rows, dim))),
        keys=None if alone and num_keys == num_queries else draw(layouts((*of_keys, dim))),
        targets=draw(targets),
        negatives=None if symmetric else draw(st.none() | layouts((*rows, samples))),
        exclude=draw(indices),
        key_range=draw(st.booleans()),
        key_bias=draw(st.none() | layouts(of_keys)),
        groups=None if contrast == "all" else draw(st.tuples(layouts(rows), layouts(of_keys))),
        contrast=contrast,
        symmetric=symmetric,
        weights=draw(st.none() | layouts(rows)),
        index_dtype=draw(st.sampled_from(INTEGERS)),
        bias_dtype=draw(st.sampled_from(FLOATING)),
        weights_dtype=draw(st.sampled_from(FLOATING)),
        no_weight=draw(st.integers(0, 5)) == 5,
        scale=scale,
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )


def indices_of(case: Contrast, device: torch.device) -> tuple[dict, dict]:
    """Indices and groups as the op gets them, and densely."""
    options, plain = {}, {}
    *batch, num_queries, _ = case.queries.shape
    num_keys = (case.keys or case.queries).shape[-2]
    least = -1 if case.index_dtype.is_signed else 0

    def place(layout: Layout, low: int, high: int) -> tuple[Tensor, Tensor]:
        assume(low < high or math.prod(layout.shape) == 0)
        placed, dense = layout.place(device, case.index_dtype, lambda n, g: integers_below(high - low)(n, g) + low)
        return placed, dense.to(torch.int64)

    # A key that the query is not contrasted with must not be its positive: these have parts of their own.
    part = (2 * num_keys + 2) // 3
    for name, low, high in (("targets", least, part), ("negatives", 0, num_keys), ("exclude", part, num_keys)):
        layout = getattr(case, name)
        if layout is not None:
            options[name], plain[name] = place(layout, low, high)
    if case.targets is None and case.exclude is not None:
        diagonal = torch.arange(num_queries).view(num_queries, *[1] * (case.exclude.shape != case.queries.shape[:-1]))
        assume(not bool((plain["exclude"] == diagonal).any()))
    if case.key_range:
        generator = torch.Generator().manual_seed(num_keys)
        ranges = torch.randint(num_keys + 1, (*batch, num_queries, 2), generator=generator).sort(-1).values
        options["key_range"], plain["key_range"] = ranges.to(device, case.index_dtype), ranges
    if case.groups is not None:
        placed = [place(layout, 0, 3) for layout in case.groups]
        options["groups"], plain["groups"] = zip(*placed, strict=True)
    for given in (options, plain):
        given |= {"contrast": case.contrast, "symmetric": case.symmetric}
    return options, plain


def test_info_nce_and_its_gradients_are_contrasts_by_hand(device, for_examples):
    @for_examples(case=contrasts())
    def holds(case: Contrast):
        options, plain = indices_of(case, device)
        learns, exact = {}, {}
        for name, dtype in (("queries", case.dtypes[0]), ("keys", case.dtypes[1]), ("key_bias", case.bias_dtype)):
            layout = getattr(case, name)
            if layout is not None:
                placed, dense = layout.place(device, dtype, case.values)
                learns[name], exact[name] = placed.detach().requires_grad_(), dense.double().requires_grad_()
        if isinstance(case.scale, Tensor) and case.scale.requires_grad:
            learns["scale"] = case.scale.detach().to(device).requires_grad_()
            exact["scale"] = case.scale.detach().double().requires_grad_()
        else:
            options["scale"], plain["scale"] = case.scale, float(case.scale)
        weights = None
        if case.weights is not None:
            options["weights"], dense_weights = case.weights.place(
                device, case.weights_dtype, lambda n, g: integers_below(4)(n, g) * (not case.no_weight) / 2
            )
            weights = plain["weights"] = dense_weights.double()

        alone = {"keys": learns["queries"]} if case.keys is None else {}
        loss, accuracy, rank = info_nce(**learns, **alone, **options, reduction=case.reduction)
        dtype = torch.float64 if torch.float64 in case.dtypes[: 1 if alone else 2] else torch.float32
        assert loss.dtype == accuracy.dtype == dtype
        assert rank.dtype == torch.int64

        # The largest absolute value of what is summed to a score, and how far a loss may be off.
        exact_keys = exact.get("keys", exact["queries"])
        dots = exact["queries"].detach().abs() @ exact_keys.detach().abs().mT
        biases = [float(exact["key_bias"].detach().abs().max())] if "key_bias" in exact and dots.numel() else []
        largest = abs(float(torch.as_tensor(case.scale).detach())) * float(dots.max() if dots.numel() else 0) + sum(
            biases
        )
        count = dots.shape[:-1].numel() if weights is None else float(weights.sum())
        bound = 4 * TOLERANCE[dtype] * (1 + largest) * (1 + count)
        # Small integers have exact scores and ties; of others a tie may round either way.
        surely = case.values is small_integers and not biases
        given = {name: value for name, value in exact.items() if name not in ("queries", "keys")}
        by_hand = contrast_by_hand(exact["queries"], exact_keys, unsure=0 if surely else bound, **plain, **given)
        expected = reduced(by_hand, weights, case.reduction)
        assert_within(loss, expected, bound)
        assert bool(((by_hand.least <= rank.cpu()) & (rank.cpu() <= by_hand.most)).all())
        counts = by_hand.present.double() * (1 if weights is None else weights)
        right = (rank.cpu() == 0).double()
        if case.reduction != "none":
            right = (counts * right).sum() / (counts.sum() if bool(counts.sum() > 0) else 1)
        assert_within(accuracy, right, 2 * TOLERANCE[dtype])

        assert not accuracy.requires_grad
        actual = torch.autograd.grad(loss.sum(), list(learns.values()))
        wanted = torch.autograd.grad(expected.sum() + 0 * sum(tensor.sum() for tensor in exact.values()),
                                     list(exact.values()))  # fmt: skip
        for name, one, other in zip(learns, actual, wanted, strict=True):
            assert one.dtype == learns[name].dtype
            # The slopes of a loss are sums of keys, queries or dots, of up to 5, whose weights are as inexact as it.
            of_values = 20 * bound * (1 + float(dots.max() if dots.numel() else 0) if name == "scale" else 1)
            assert_within(one, other, TOLERANCE[one.dtype] * (1 + other.abs()) + of_values)


def test_indices_name_keys(device, request, for_examples):
    """Any 64-bit numbers: an IndexError on the CPU where they name no key, a NaN loss elsewhere."""
    on_cpu = request.node.callspec.params["device"] == "cpu"

    @for_examples(
        num_keys=st.integers(1, 4),
        targets=st.lists(st.integers(-1, 3), min_size=3, max_size=3),
        name=st.sampled_from(["targets", "negatives", "exclude", "key_range"]),
        value=st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1),
        at=st.integers(0, 5),
    )
    def holds(num_keys, targets, name, value, at):
        targets = torch.tensor(targets).clamp(max=num_keys - 1)
        indices = {
            "targets": targets[:, None].repeat(1, 2),
            "negatives": targets.clamp(min=0)[:, None].repeat(1, 2),
            "exclude": torch.full((3, 2), -1),
            "key_range": torch.tensor([[0, num_keys]]).repeat(3, 1),
        }
        if name != "negatives":
            del indices["negatives"]
        indices[name].view(-1)[at] = value
        row = at // 2
        generator = torch.Generator().manual_seed(0)
        queries, keys = normal(3 * 2, generator).view(3, 2), normal(num_keys * 2, generator).view(num_keys, 2)

        def contrast(**options):
            tensors = {name: on(device, value) for name, value in indices.items()}
            return info_nce(queries.to(device), keys.to(device), **tensors, **options)

        begin, end = indices["key_range"][row].tolist()
        names_no_key = not 0 <= value < num_keys and not (value == -1 and name != "negatives")
        if name == "key_range":
            names_no_key = not 0 <= begin <= end <= num_keys
        names_positive = name == "exclude" and value >= 0 and value == targets[row]
        if on_cpu and names_no_key:
            with pytest.raises(IndexError, match=f"{name} must be"):
                contrast()
        elif on_cpu and names_positive:
            with pytest.raises(ValueError, match="exclude must not name a positive"):
                contrast()
        else:
            right = {key: tensor.clone() for key, tensor in indices.items()}
            if names_no_key or names_positive:
                right[name][row] = (
                    torch.tensor([0, num_keys]) if name == "key_range" else -1 if name == "exclude" else 0
                )
            by_hand = contrast_by_hand(queries, keys, **right)
            losses = by_hand.losses
            # A row without a positive counts as one of weight 0, whatever else it names.
            present = (indices["targets"] != -1).any(-1)
            if names_no_key or names_positive:
                losses[row] = math.nan if bool(present[row]) else 0
            result = contrast(reduction="none")
            assert_within(result.loss, losses, 1e-12)
            assert (result.rank[row] == -1) == (names_no_key or names_positive)


INDICES = torch.zeros(3, dtype=torch.int64)


def has_a_row_each(shape: tuple[int, ...]) -> bool:
    return len(shape) in (1, 2) and shape[0] == 3


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
    "targets": NOT_TENSORS
    | other_layouts((3,), torch.int64)
    | tensors((3,), torch.int64, NOT_INDICES, fits=has_a_row_each),
    "negatives": NOT_TENSORS
    | other_layouts((3, 2), torch.int64)
    | tensors((3, 2), torch.int64, NOT_INDICES, fits=lambda shape: len(shape) == 2 and shape[0] == 3),
    "exclude": NOT_TENSORS
    | other_layouts((3,), torch.int64)
    | tensors((3,), torch.int64, NOT_INDICES, fits=has_a_row_each),
    "key_range": NOT_TENSORS | other_layouts((3, 2), torch.int64) | tensors((3, 2), torch.int64, NOT_INDICES),
    "key_bias": NOT_TENSORS
    | other_layouts((4,), torch.float32)
    | tensors((4,), torch.float32, [*INTEGERS, torch.bool, torch.complex64]),
    "groups": NOT_TENSORS
    | st.sampled_from([torch.zeros(2, 3), (INDICES,), (INDICES, INDICES, INDICES), (INDICES,) * 2]),
    "contrast": st.sampled_from([None, "", "ALL", "same", "other", 1, [], {}, torch.zeros(3), object()]),
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
