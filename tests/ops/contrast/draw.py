"""Random problems for the contrastive ops, with any of their options, and their results computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpc_ext.ops import info_nce, scores_logsumexp, sigmoid_contrast
from cpc_ext.ops.info_nce import info_nce_reference
from tests.ops.contrast.by_hand import ByHand, contrast_by_hand

__all__ = ["DTYPES", "TOLERANCE", "Problem", "Results", "assert_same_bits", "draw", "on", "reduced"]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Shares of the largest value of a gradient: float32 sums, or a rounding to the gradients' type and, on CUDA, that of
# probabilities to the queries'.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
MEASURES: dict[str, Callable[..., Any]] = {
    "softmax": info_nce,
    "log_sum": scores_logsumexp,
    "sigmoid": sigmoid_contrast,
}


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(on(device, one) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


@dataclass
class Results:
    """Losses as reduced, ranks where there are any, and gradients by names."""

    loss: Tensor
    accuracy: Tensor | None
    rank: Tensor | None
    gradients: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [one for one in (self.loss, self.accuracy, self.rank, *self.gradients.values()) if one is not None]


@dataclass
class Problem:
    """Arguments of an op on the CPU.

    learns: tensors that require gradients, in their own types. given: other arguments. If learns has no keys, the
    queries are contrasted with each other.
    """

    learns: dict[str, Tensor]
    given: dict[str, Any] = field(default_factory=dict)
    measure: str = "softmax"

    def arguments(self, device: torch.device) -> dict[str, Any]:
        inputs = {name: tensor.detach().to(device).requires_grad_() for name, tensor in self.learns.items()}
        return {"keys": inputs["queries"]} | inputs | {name: on(device, value) for name, value in self.given.items()}

    def run(self, device: torch.device, reduction: str = "mean", wanted: tuple[str, ...] | None = None) -> Results:
        """Run the op, with the gradients of all tensors in learns, or of the wanted ones."""
        arguments = self.arguments(device)
        for name in self.learns:
            arguments[name].requires_grad_(wanted is None or name in wanted)
        options = {} if self.measure == "log_sum" else {"reduction": reduction}
        output = MEASURES[self.measure](**arguments, **options)
        loss, accuracy, rank = output if isinstance(output, tuple) else (output, None, None)
        inputs = {name: arguments[name] for name in self.learns if wanted is None or name in wanted}
        gradients = torch.autograd.grad(loss, list(inputs.values()), _upstream(loss).to(loss))
        return Results(loss.detach(), accuracy, rank, dict(zip(inputs, gradients, strict=True)))

    def exactly(self, reduction: str = "mean", *, by_reference: bool = False) -> tuple[Results, ByHand]:
        """Compute the results by hand in float64, or by the reference if loops would take long."""
        exact = {name: tensor.detach().double().requires_grad_() for name, tensor in self.learns.items()}
        options = {"keys": exact["queries"]} | self.given | exact
        if by_reference:
            return _by_reference(options, exact, reduction)
        queries, keys = options.pop("queries"), options.pop("keys")
        if "bias" in options:  # One for all keys.
            options["key_bias"] = torch.as_tensor(options.pop("bias")).double().expand(keys.shape[:-1])
        unsure = 1e-12 if self.learns["queries"].dtype == torch.float64 else 2e-6
        result = contrast_by_hand(queries, keys, measure=self.measure, unsure=unsure, **options)
        loss = result.losses
        if self.measure != "log_sum":
            loss = reduced(result, options.get("weights"), reduction)
        return Results(loss.detach(), None, None, _gradients(loss, exact)), result

    def check(self, device: torch.device, reduction: str = "mean", *, by_reference: bool = False) -> None:
        """Assert that the op's results equal those by hand."""
        actual = self.run(device, reduction)
        expected, by_hand = self.exactly(reduction, by_reference=by_reference)
        double = self.learns["queries"].dtype == torch.float64
        precise = 1e-12 if double else 1e-5
        assert actual.loss.dtype == (torch.float64 if double else torch.float32)
        torch.testing.assert_close(actual.loss.double().cpu(), expected.loss, atol=precise, rtol=precise)
        if actual.rank is not None and actual.accuracy is not None:
            rank = actual.rank.cpu()
            assert ((by_hand.least <= rank) & (rank <= by_hand.most)).all(), (by_hand, rank)
            weights = _weights(by_hand, self.given.get("weights", self.learns.get("weights")))
            right = (rank == 0).double()
            if reduction != "none":
                right = (weights * right).sum() / max(float(weights.sum()), 1e-30)
            torch.testing.assert_close(actual.accuracy.double().cpu(), right, atol=1e-6, rtol=0)
        for name, gradient in actual.gradients.items():
            self._check_gradient(name, gradient, expected.gradients[name])

    def _check_gradient(self, name: str, actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == self.learns[name].dtype, name
        assert actual.shape == expected.shape, name
        # Sums are in float32 at least, whatever a gradient is rounded to; but those of queries and keys are of
        # probabilities in the queries' type on CUDA.
        queries = self.learns["queries"].dtype
        of_probabilities = name in ("queries", "keys")
        rounded = queries if of_probabilities else torch.promote_types(queries, torch.float32)
        allowed = max(TOLERANCE[rounded], TOLERANCE[actual.dtype])
        largest = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-3)
        torch.testing.assert_close(
            actual.double().cpu(),
            expected,
            atol=allowed * largest,
            rtol=allowed,
            msg=lambda text: f"gradient of {name}: {text}",
        )


def _gradients(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad:  # Without queries it has nothing of them.
        return {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    gradients = torch.autograd.grad(loss, list(inputs.values()), _upstream(loss), allow_unused=True)
    return {
        name: torch.zeros_like(inputs[name]) if gradient is None else gradient
        for name, gradient in zip(inputs, gradients, strict=True)
    }


def _by_reference(arguments: dict[str, Any], inputs: dict[str, Tensor], reduction: str) -> tuple[Results, ByHand]:
    result = info_nce_reference(**arguments, reduction=reduction)
    targets = arguments.get("targets")
    present = torch.ones_like(result.rank, dtype=torch.bool)
    if targets is not None:
        present = (targets.unsqueeze(-1).flatten(result.rank.ndim) >= 0).any(-1)
    # A key in some thousands is so near the best that it may count or not.
    by_hand = ByHand(result.loss, result.rank - 1, result.rank + 1, present)
    return Results(result.loss.detach(), None, None, _gradients(result.loss, inputs)), by_hand


def _weights(by_hand: ByHand, weights: Tensor | None) -> Tensor:
    """Return the weights of queries, 0 for those without a positive."""
    return by_hand.present.double() if weights is None else torch.where(by_hand.present, weights.detach().double(), 0)


def reduced(result: ByHand, weights: Tensor | None, reduction: str) -> Tensor:
    weights = result.present.double() if weights is None else torch.where(result.present, weights, 0)
    counts = (weights != 0) | result.losses.isfinite()
    losses = torch.where(counts, weights, 0) * torch.where(counts, result.losses, 0)
    if reduction == "none":
        return losses
    total = weights.sum() if float(weights.detach().sum()) > 0 else torch.ones(())
    return losses.sum() / (total if reduction == "mean" else 1)


def _upstream(loss: Tensor) -> Tensor:
    """Return upstream gradients of a loss, all different, and 0 where the loss is the logarithm of an empty sum."""
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64, device=loss.device).reshape(loss.shape)
    return torch.where(loss.detach().isneginf(), 0, upstream)


def draw(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    measure: str = "softmax",
    batch: tuple[int, ...] = (),
    targets: bool = False,
    positives: int | None = None,
    samples: int | None = None,
    excluded: int | None = None,
    ranges: bool = False,
    contrast: str = "all",
    bias: torch.dtype | None = None,
    scale: Any = 0.7,
    weights: bool = False,
    permuted: bool = False,
    alone: bool = False,
    seed: int = 0,
    **given: Any,
) -> Problem:
    """Draw a problem of M queries and N keys of D features, with the requested options.

    Args:
        shape: M, N, D.
        targets: one positive for each query; ``positives`` of them, some absent, some twice, and none at all for one
            query; ``permuted``: each key is a positive once.
        excluded: number of excluded keys of each query, 0 for a tensor [*, M]; they are not positives.
        ranges: key ranges, some empty, some whole, of any length; many do not contain the positives.
        contrast: contrast by groups; a query's group may have no key, and group numbers agree in their low 32 bits.
        bias: dtype of biases.
        scale: a tensor requires a gradient.
        alone: the queries are their own keys; ``permuted`` then makes pairs of them, each the other's positive.
    """
    num_queries, num_keys, dim = shape
    generator = torch.Generator().manual_seed(seed + num_queries + 7 * num_keys + 13 * dim)
    rows = (*batch, num_queries)

    def integers(end: int, *size: int, start: int = 0) -> Tensor:
        return torch.randint(start, max(end, start + 1), size, generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    learns = {
        "queries": (normal(*rows, dim) * max(dim, 1) ** -0.5).to(dtype),
        "keys": normal(*batch, num_keys, dim).to(dtype),
    }
    named = torch.arange(num_queries).expand(rows).unsqueeze(-1)
    if positives is not None:
        named = given["targets"] = integers(num_keys, *rows, positives, start=-1)
        if num_queries > 2:
            named[..., 2, :] = -1
    elif targets:
        given["targets"] = integers(num_keys, *rows)
        named = given["targets"].unsqueeze(-1)
    elif permuted and alone:
        given["targets"] = torch.arange(num_queries).roll(num_queries // 2).expand(rows)
        named = given["targets"].unsqueeze(-1)
    elif permuted:
        given["targets"] = torch.rand(rows, generator=generator).argsort(-1)
        named = given["targets"].unsqueeze(-1)
    if samples is not None:
        given["negatives"] = integers(num_keys, *rows, samples)
    if excluded is not None:
        chosen = integers(num_keys, *rows, excluded or 1, start=-1)
        if measure != "log_sum":
            chosen[(chosen.unsqueeze(-1) == named.unsqueeze(-2)).any(-1)] = -1
        given["exclude"] = chosen if excluded else chosen.squeeze(-1)
    if ranges:
        given["key_range"] = integers(num_keys + 1, *rows, 2).sort(-1).values
        if num_queries > 2:
            given["key_range"][..., 0, :] = torch.tensor([0, num_keys])
            given["key_range"][..., 1, :] = num_keys
    if contrast != "all":
        given["contrast"] = contrast
        given["groups"] = tuple(integers(3, *size, start=low) * 2**32 + 5 for size, low in (
            (rows, -1), ((*batch, num_keys), 0)))  # fmt: skip
    if bias is not None:
        learns["key_bias"] = normal(*batch, num_keys).to(bias)
    if weights:
        learns["weights"] = torch.rand(rows, generator=generator).mul(3).floor()
    if alone:
        del learns["keys"]
    (learns if isinstance(scale, Tensor) and scale.requires_grad else given)["scale"] = scale
    return Problem(learns, given, measure)


def assert_same_bits(one: Results, other: Results) -> None:
    for first, second in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(first, second) or torch.equal(first.nan_to_num(123), second.nan_to_num(123))
