"""info_nce against cross-entropy over a matrix of scores, and against gathered negatives.

With all keys as negatives, the work is the floating-point operations of the score matrix, and twice as many for the
gradients; ``info_nce_growth`` measures this for many numbers of rows and features. With sampled negatives, the work is
the bytes of queries, keys and indices (and of the gradients), each read or written once, although a formulation that
gathers reads a key many times. Ours also returns the accuracy.

With sampled negatives there is a rival that copies no keys: it multiplies all queries by all keys, and gathers the
scores that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from benchmark import Case, Op, Problem, both_passes, compiled
from torch import Tensor

from cpc_ext.ops import info_nce

# CPCV2-PyTorch on STL-10: a 7x7 grid, 256 features, five steps with one row skipped, 16 negatives.
GRID, DIM, STEPS, SKIP, NEGATIVES = 7, 256, 5, 1, 16


def plain_all(queries: Tensor, keys: Tensor) -> Tensor:
    """Compute the loss in plain PyTorch: the positives are on the diagonal of the score matrix."""
    return F.cross_entropy((queries @ keys.T).float(), torch.arange(len(queries), device=queries.device))


def plain_sampled(queries: Tensor, keys: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Compute the loss in plain PyTorch: gather the positive and the negatives of each query and multiply."""
    contrasted = keys[torch.cat([targets.unsqueeze(1), negatives], dim=1)]
    scores = (contrasted @ queries.unsqueeze(2)).squeeze(2).float()
    return F.cross_entropy(scores, torch.zeros_like(targets))


def plain_scores(queries: Tensor, keys: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Compute the same loss from the matrix of all scores, of which a few are gathered."""
    scores = (queries @ keys.T).gather(1, torch.cat([targets.unsqueeze(1), negatives], dim=1)).float()
    return F.cross_entropy(scores, torch.zeros_like(targets))


@dataclass(frozen=True)
class AllCase(Case):
    """As many queries as keys, with every key in each query's contrast."""

    rows: int
    dim: int = DIM

    @property
    def label(self) -> str:
        return f"[{self.rows},{self.dim}] x [{self.rows},{self.dim}]"

    @property
    def size(self) -> int:
        return self.rows


@dataclass(frozen=True)
class SampledCase(Case):
    """Queries with negatives sampled from shared keys."""

    queries: int
    keys: int

    @property
    def label(self) -> str:
        return f"[{self.queries},{DIM}] x {NEGATIVES} of [{self.keys},{DIM}]"

    @property
    def size(self) -> int:
        return self.queries


def prepare_all(case: AllCase, device: torch.device) -> Problem:
    queries, keys = _encodings(case, case.rows, case.rows, case.dim, device)

    def run(loss) -> Tensor | tuple[Tensor, ...]:
        value = loss(queries, keys)
        return torch.autograd.grad(value, (queries, keys)) if case.backward else value

    plain_compiled = compiled(plain_all)
    return Problem(
        {
            "eager": lambda: run(plain_all),
            "compiled": lambda: run(plain_compiled),
            "ours": lambda: run(lambda queries, keys: info_nce(queries, keys).loss),
        },
        2 * case.rows**2 * case.dim * (3 if case.backward else 1),
    )


def prepare_growth(case: AllCase, device: torch.device) -> Problem:
    """Prepare the same problem without the compiled alternative, as the question is where eager is faster."""
    problem = prepare_all(case, device)
    alternatives = {name: problem.alternatives[name] for name in ("eager", "ours")}
    return replace(problem, alternatives=alternatives, tolerance=5e-2)


def prepare_sampled(case: SampledCase, device: torch.device) -> Problem:
    queries, keys = _encodings(case, case.queries, case.keys, DIM, device)
    targets = torch.randint(case.keys, (case.queries,), device=device)
    negatives = torch.randint(case.keys, (case.queries, NEGATIVES), device=device)

    def run(loss) -> Tensor | tuple[Tensor, ...]:
        value = loss(queries, keys, targets, negatives)
        return torch.autograd.grad(value, (queries, keys)) if case.backward else value

    def ours(queries: Tensor, keys: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        return info_nce(queries, keys, targets, negatives=negatives).loss

    plain_compiled = compiled(plain_sampled)
    forward_bytes = queries.nbytes + keys.nbytes + targets.nbytes + negatives.nbytes
    # Backward reads all of it again and writes the gradients of queries and keys.
    backward_bytes = forward_bytes + queries.nbytes + keys.nbytes if case.backward else 0
    return Problem(
        {
            "eager": lambda: run(plain_sampled),
            "eager, all scores": lambda: run(plain_scores),
            "compiled": lambda: run(plain_compiled),
            "ours": lambda: run(ours),
        },
        forward_bytes + backward_bytes,
        # Eager accumulates a key's gradient in the keys' own type.
        tolerance=2e-2 if case.dtype == "float32" else 5e-2,
    )


def _encodings(case: Case, queries: int, keys: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random queries and keys whose scores have unit variance."""
    dtype = getattr(torch, case.dtype)
    scaled = torch.randn(queries, dim, device=device) * dim**-0.5
    pair = scaled.to(dtype), torch.randn(keys, dim, device=device).to(dtype)
    return tuple(tensor.requires_grad_(case.backward) for tensor in pair)


# Images in a batch.
BATCHES, QUICK_BATCH = (4, 16, 64, 256), 16


def _all_cases() -> list[Case]:
    """Return cases of a batch's first CPC step, against all encodings of the predicted rows, and larger problems."""

    def rows(batch: int) -> int:
        return (GRID - SKIP - 1) * GRID * batch

    return [
        *(c for b in BATCHES for c in both_passes(AllCase, rows(b), sweep=True, quick=b == QUICK_BATCH)),
        *both_passes(AllCase, rows(QUICK_BATCH), dtype="bfloat16"),
        *both_passes(AllCase, 4096, quick=True),
        *both_passes(AllCase, 4096, 1024),
        *both_passes(AllCase, 4096, dtype="bfloat16"),
        *both_passes(AllCase, 4096, dtype="float16"),
        *both_passes(AllCase, 4096, 1024, dtype="bfloat16"),
        *both_passes(AllCase, 16384, dtype="bfloat16"),
    ]


def _sampled_cases() -> list[Case]:
    """Return cases of all CPC steps of a batch, against its encodings; and a larger problem."""

    def sizes(batch: int) -> tuple[int, int]:
        queries = sum(GRID - SKIP - step for step in range(1, STEPS + 1)) * GRID * batch
        return queries, GRID * GRID * batch

    return [
        *(c for b in BATCHES for c in both_passes(SampledCase, *sizes(b), sweep=True, quick=b == QUICK_BATCH)),
        *both_passes(SampledCase, *sizes(QUICK_BATCH), dtype="bfloat16"),
        *both_passes(SampledCase, 4096, 4096, quick=True),
    ]


def _growth_cases() -> list[Case]:
    """Return cases from small batches, dominated by the call's overhead, to score matrices larger than the caches."""
    return [
        AllCase(rows, dim, dtype=dtype, backward=True, sweep=dim == 128, quick=(rows, dim) == (256, 128))
        for dtype in ("float32", "bfloat16")
        for dim in (32, 128, 512, 2048)
        for rows in (4, 16, 64, 256, 1024, 4096)
    ]


OPS = (
    Op("info_nce_all", "compute", "queries and keys of 256 features", _all_cases(), prepare_all),
    Op(
        "info_nce_growth", "compute", "queries and keys of 128 features", _growth_cases(), prepare_growth, counted=False
    ),
    Op("info_nce_sampled", "memory", "queries of 256 features, 16 negatives", _sampled_cases(), prepare_sampled),
)
