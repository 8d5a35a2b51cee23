"""The arguments of contrasts: their checks, and their conversion to the op's problem."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpc_ext.ops._contrast_problem import Contrast, sums_dtype
from cpc_ext.ops._contrast_weights import Weigh, weigh_plainly, weights_of_present
from cpc_ext.ops._library import autocast_dtype, refuse_forward_mode, values_at_hand

__all__ = [
    "INTEGERS",
    "REDUCTIONS",
    "ContrastOptions",
    "as_int64",
    "check_arguments",
    "check_number",
    "check_positive",
    "common_dtype",
    "flat_problem",
]

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
REDUCTIONS = ("mean", "sum", "none")
_CONTRASTS = ("all", "same", "other")
# Numbers count as finite up to the largest float: torch.compile cannot test a symbolic number for being finite, and an
# integer may be larger.
_LARGEST, _LARGEST_INDEX = sys.float_info.max, torch.iinfo(torch.int64).max


class ContrastOptions(NamedTuple):
    """Arguments of contrasts besides queries and keys, as :func:`cpc_ext.ops.info_nce` describes them."""

    scale: float | Tensor = 1.0
    targets: Tensor | None = None
    negatives: Tensor | None = None
    weights: Tensor | None = None
    exclude: Tensor | None = None
    key_range: Tensor | None = None
    key_bias: Tensor | None = None
    groups: tuple[Tensor, Tensor] | None = None
    contrast: str = "all"
    symmetric: bool = False


def flat_problem(
    queries: Tensor,
    keys: Tensor,
    options: ContrastOptions,
    measure: str,
    *,
    batched: bool = True,
    weigh: Weigh = weigh_plainly,
) -> tuple[Contrast, Tensor | None]:
    """Return the problem, its leading dimensions merged to one, and the queries' weights [B, M], None if all are 1.

    batched: whether to add a leading dimension where there is none. weigh: computes the weights.
    """
    problem = _flat(queries, keys, options, measure, batched)
    if options.weights is options.targets is None:
        return problem, None
    weights = None if options.weights is None else options.weights.reshape(problem.queries.shape[:-1])
    return problem, weights_of_present(problem.targets, weights, sums_dtype(queries), weigh)


def check_arguments(queries: Tensor, keys: Tensor, options: ContrastOptions, measure: str, reduction: str) -> None:
    """Raise an error that names the first invalid argument, as :func:`cpc_ext.ops.info_nce` documents it."""
    _check_rows("queries", queries)
    if keys is not queries:
        _check_rows("keys", keys)
    shape, keys_shape, device = queries.shape, keys.shape, queries.device
    if shape[:-2] != keys_shape[:-2] or shape[-1] != keys_shape[-1]:
        raise ValueError(
            f"keys must have the leading dimensions and the D of queries {tuple(shape)}, got {tuple(keys_shape)}"
        )
    if keys.device != device:
        raise ValueError(f"keys must be on the queries' device {device}, got {keys.device}")
    num_queries, num_keys = shape[-2], keys_shape[-2]
    scale, targets, negatives, weights, exclude, key_range, key_bias, groups, contrast, symmetric = options
    if targets is None and num_queries > num_keys and measure != "log_sum":
        raise ValueError(f"targets is needed where there are more queries ({num_queries}) than keys ({num_keys})")
    leading, rows = shape[:-2], shape[:-1]
    if not (targets is negatives is exclude is key_range is weights is key_bias is None):
        _check_given("targets", targets, (rows, (*rows, "P")), device)
        _check_given("negatives", negatives, ((*rows, "S"),), device)
        _check_given("exclude", exclude, (rows, (*rows, "E")), device)
        _check_given("key_range", key_range, ((*rows, 2),), device)
        _check_given("weights", weights, (rows,), device, floating=True)
        _check_given("key_bias", key_bias, ((*leading, num_keys),), device, floating=True)
    if groups is not None or contrast != "all":
        _check_groups(options, rows, (*leading, num_keys), device)
    if type(scale) is not float or not abs(scale) <= _LARGEST:  # Hardly ever.
        check_number("scale", scale)
    if symmetric:
        if negatives is not None:
            raise ValueError("symmetric contrasts all keys and queries: it takes no negatives")
        if num_queries != num_keys:
            raise ValueError(f"symmetric needs as many keys as queries, got {num_keys} keys, {num_queries} queries")
        if targets is not None and targets.shape != rows:
            raise ValueError(f"symmetric needs one positive a query, got targets {tuple(targets.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    refuse_forward_mode(queries, keys, weights, key_bias, scale if isinstance(scale, Tensor) else None)
    _check_weights(weights)


# The usual dtypes of queries and keys, which pass all checks.
_USUAL = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def _check_rows(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _USUAL:
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        if value.dtype.itemsize < 2:
            raise TypeError(f"{name} must be floating with 16 bits or more, got {value.dtype}")
    _check_layout(name, value)
    if value.ndim < 2:
        size = "M" if name == "queries" else "N"
        raise ValueError(f"{name} must be [*, {size}, D], got shape {tuple(value.shape)}")


def _check_groups(options: ContrastOptions, rows: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> None:
    if options.contrast not in _CONTRASTS:
        raise ValueError(f'contrast must be "all", "same" or "other", got {options.contrast!r}')
    if options.groups is None:
        if options.contrast != "all":
            raise ValueError(f'contrast="{options.contrast}" needs groups')
        return
    if not isinstance(options.groups, Sequence) or isinstance(options.groups, str) or len(options.groups) != 2:
        raise TypeError(f"groups must be a pair (query_groups, key_groups), got {type(options.groups).__name__}")
    for name, groups, shape in zip(("query_groups", "key_groups"), options.groups, (rows, keys), strict=True):
        if groups is None:
            raise TypeError(f"{name} must be a tensor, got None")
        _check_given(name, groups, (shape,), device)
    if options.contrast == "all":
        raise ValueError('groups needs contrast="same" or "other", as "all" contrasts keys of every group')


def _check_given(
    name: str,
    value: Tensor | None,
    shapes: Sequence[Sequence[int | str]],
    device: torch.device,
    *,
    floating: bool = False,
) -> None:
    """Check a tensor that may be None. shapes: the shapes that it may have, where a letter stands for any size."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if not floating and value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    _check_layout(name, value)
    if not any(
        len(shape) == value.ndim
        and all(isinstance(size, str) or size == actual for size, actual in zip(shape, value.shape, strict=True))
        for shape in shapes
    ):
        wanted = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the queries' device {device}, got {value.device}")


def _check_layout(name: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_number(name: str, value: float | Tensor) -> None:
    """Raise an error unless this is a finite number, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, got {value.dtype}")
        if value.ndim != 0:
            raise ValueError(f"{name} must be a number or a tensor without dimensions, got shape {tuple(value.shape)}")
        if values_at_hand(value) and not bool(torch.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {value.item()}")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(name: str, value: float | Tensor) -> None:
    """Raise an error unless this is a finite number above 0, or a tensor of one."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_weights(weights: Tensor | None) -> None:
    if weights is None or not values_at_hand(weights):
        return
    # In float64, because not every floating-point dtype supports comparison.
    if weights.numel() and (lowest := weights.detach().double().min().item()) < 0:
        raise ValueError(f"weights must not be negative, got {lowest}")


def common_dtype(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys in one dtype: their promoted one, or autocast's, as for a matrix product."""
    dtype = queries.dtype
    if keys.dtype != dtype:
        dtype = torch.promote_types(dtype, keys.dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(queries.device) or dtype
    # Converting to the dtype that a tensor already has takes time, too.
    first = queries if queries.dtype == dtype else queries.to(dtype)
    return first, first if keys is queries else keys if keys.dtype == dtype else keys.to(dtype)


def _flat(queries: Tensor, keys: Tensor, options: ContrastOptions, measure: str, batched: bool) -> Contrast:
    """Return the arguments with leading dimensions merged to one, and without keys if these are the queries."""
    scale, targets, negatives, _, exclude, key_range, key_bias, groups, contrast, symmetric = options
    shape, alone = queries.shape, keys is queries
    if len(shape) > 3 or (batched and len(shape) == 2):
        entries = math.prod(shape[:-2])  # numel() would specialize sizes that torch.export leaves symbolic.
        queries = queries.reshape(entries, *shape[-2:])
        keys = queries if alone else keys.reshape(entries, *keys.shape[-2:])
    rows, key_rows = queries.shape[:-1], keys.shape[:-1]

    def indices(value: Tensor | None) -> Tensor | None:
        """Reshape [*, M] or [*, M, C] to [B, M, C]."""
        if value is None:
            return None
        columns = value.shape[-1] if value.ndim == len(shape) else 1
        return as_int64(value).reshape(*rows, columns)

    query_groups, key_groups = (None, None) if groups is None else groups
    scales = None
    if isinstance(scale, Tensor) and (scale.requires_grad or not values_at_hand(scale)):
        scales = scale.to(queries.device, sums_dtype(queries)).reshape(1)
        scale = 1.0
    return Contrast(
        queries,
        None if alone else keys,
        _each_once(indices(targets)),
        indices(negatives),
        indices(exclude),
        indices(key_range),
        None if query_groups is None else query_groups.to(torch.int64).reshape(rows),
        None if key_groups is None else key_groups.to(torch.int64).reshape(key_rows),
        None if key_bias is None else key_bias.reshape(key_rows),
        scales,
        float(scale),
        measure,
        contrast,
        symmetric,
    )


def as_int64(indices: Tensor) -> Tensor:
    """Convert indices to int64; larger ones, which name no key, become its maximum: a negative one would mean none."""
    converted = indices.to(torch.int64)
    return converted if indices.dtype != torch.uint64 else converted.masked_fill(converted < 0, _LARGEST_INDEX)


def _each_once(targets: Tensor | None) -> Tensor | None:
    """Replace repeated targets of a query by -1, as the kernels require: [B, M, P]."""
    if targets is None or targets.shape[-1] < 2:
        return targets
    targets = targets.sort(-1).values
    again = targets[..., 1:] == targets[..., :-1]
    return torch.cat([targets[..., :1], targets[..., 1:].masked_fill(again, -1)], -1)
