"""Time and memory of our losses, with gradients, compared with the libraries that they replace.

"eager" is the original's formula in plain PyTorch, "compiled" the same under torch.compile. The library itself is
measured, too, if it is installed (``pip install '.[originals]'``). Prints a table; with ``--out`` writes it as JSON.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import Case, Op, Problem, compiled, measure
from kernels import print_row
from machine import add_common_arguments, at_least, describe, result_file, write_json
from torch import Tensor

from cpc_ext import nn
from cpc_ext.ops import info_nce, sigmoid_contrast

TEMPERATURE, CLASSES = 0.1, 100
# Without the step that turns views into rows, so that its gradients differ and are not compared.
OP_ALONE = "ours, info_nce of the same rows"


@dataclass(frozen=True)
class LossCase(Case):
    """``rows`` samples, or pairs of samples, of ``dim`` features."""

    rows: int
    dim: int

    @property
    def label(self) -> str:
        return f"{self.rows} of {self.dim} features"


Make = Callable[[], object]


def _originals(**by_name: Make) -> dict[str, Any]:
    """Make the losses of those libraries that are installed."""
    made = {}
    for name, make in by_name.items():
        try:
            made[name] = make()
        except ImportError:
            continue
    return made


def _open_clip(name: str) -> Make:
    def make() -> object:
        import open_clip.loss

        return getattr(open_clip.loss, name)()

    return make


def _lightly(name: str) -> Make:
    def make() -> object:
        import lightly.loss

        return getattr(lightly.loss, name)(temperature=TEMPERATURE)

    return make


def _metric_learning(name: str) -> Make:
    def make() -> object:
        from pytorch_metric_learning import losses

        return getattr(losses, name)(temperature=TEMPERATURE)

    return make


def _problem(case: LossCase, tensors: tuple[Tensor, ...], losses: dict[str, Any], **more: Any) -> Problem:
    """Return the problem of computing a loss and the gradients of all tensors that require them."""
    inputs = [tensor for tensor in tensors if tensor.requires_grad]

    def call(name: str, loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...] | None]:
        def run() -> tuple[Tensor, ...] | None:
            value = loss(*tensors)
            results = (value, *torch.autograd.grad(value, inputs))
            return None if name == OP_ALONE else results

        return run

    alternatives = {name: call(name, loss) for name, loss in losses.items()}
    if "eager" in losses:
        alternatives["compiled"] = call("compiled", compiled(losses["eager"]))
    return Problem(alternatives, 3.0 * 2 * case.rows**2 * case.dim, tolerance=3e-2, **more)


def _features(case: LossCase, device: torch.device, count: int) -> tuple[Tensor, ...]:
    dtype = getattr(torch, case.dtype)
    drawn = (torch.randn(case.rows, case.dim, device=device) for _ in range(count))
    return tuple(F.normalize(values, dim=1).to(dtype).requires_grad_() for values in drawn)


def _labels(case: LossCase, device: torch.device) -> Tensor:
    """Return labels with which every sample has a positive; libraries treat samples without one differently."""
    return torch.arange(case.rows, device=device) % CLASSES


# --- Two-way contrasts ---


def prepare_symmetric(case: LossCase, device: torch.device) -> Problem:
    queries, keys = _features(case, device, 2)
    scale = torch.tensor(1 / TEMPERATURE, device=device, requires_grad=True)

    def two_calls(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        return (info_nce(queries, keys, scale=scale).loss + info_nce(keys, queries, scale=scale).loss) / 2

    losses = {
        "two calls": two_calls,
        "ours": lambda queries, keys, scale: info_nce(queries, keys, scale=scale, symmetric=True).loss,
    }
    return _problem(case, (queries, keys, scale), losses)


def plain_clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(images), device=images.device)
    logits = (scale * images @ texts.T).float()
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def prepare_clip(case: LossCase, device: torch.device) -> Problem:
    tensors = (*_features(case, device, 2), torch.tensor(1 / TEMPERATURE, device=device, requires_grad=True))
    losses = {"eager": plain_clip, **_originals(open_clip=_open_clip("ClipLoss")), "ours": nn.CLIPLoss()}
    return _problem(case, tensors, losses)


def plain_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (scale * images @ texts.T + bias).float()
    signs = 2 * torch.eye(len(images), device=images.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def prepare_siglip(case: LossCase, device: torch.device) -> Problem:
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (1 / TEMPERATURE, -10.0))
    tensors = (*_features(case, device, 2), scale, bias)

    def ours(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_contrast(images, texts, scale=scale, bias=bias)

    losses = {"eager": plain_siglip, **_originals(open_clip=_open_clip("SigLipLoss")), "ours": ours}
    return _problem(case, tensors, losses)


# --- Classes ---


def plain_sup_con(features: Tensor, labels: Tensor) -> Tensor:
    features = F.normalize(features.float(), dim=1)
    logits = features @ features.T / TEMPERATURE
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    positives = ((labels[:, None] == labels) & ~own).float()
    log_shares = logits - logits.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
    return -((positives * log_shares).sum(1) / positives.sum(1).clamp_min(1)).mean()


def prepare_sup_con(case: LossCase, device: torch.device) -> Problem:
    (features,) = _features(case, device, 1)
    labels = _labels(case, device)
    ours = nn.SupConLoss(TEMPERATURE, base_temperature=TEMPERATURE)
    losses = {
        "eager": plain_sup_con,
        **_originals(metric_learning=_metric_learning("SupConLoss")),
        "ours": lambda features, labels: ours(F.normalize(features, dim=1).unsqueeze(1), labels),
    }
    return _problem(case, (features, labels), losses)


def prepare_labelled(case: LossCase, device: torch.device) -> Problem:
    (features,) = _features(case, device, 1)
    labels = _labels(case, device)

    def plain(features: Tensor, labels: Tensor) -> Tensor:
        features = F.normalize(features.float(), dim=1)
        logits = features @ features.T / TEMPERATURE
        same = labels[:, None] == labels
        others = logits.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
        pairs = same & ~torch.eye(len(features), dtype=torch.bool, device=features.device)
        return torch.where(pairs, F.softplus(others - logits), 0).sum() / pairs.sum()

    losses = {
        "eager": plain,
        **_originals(metric_learning=_metric_learning("NTXentLoss")),
        "ours": nn.LabelledNTXentLoss(TEMPERATURE),
    }
    return _problem(case, (features, labels), losses)


# --- Views ---


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    views = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = views @ views.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -math.inf)
    targets = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(logits, targets)


def prepare_nt_xent(case: LossCase, device: torch.device) -> Problem:
    first, second = (view[: case.rows // 2].detach().requires_grad_() for view in _features(case, device, 2))
    own = torch.arange(case.rows, device=device)
    targets = own.roll(case.rows // 2)

    def alone(first: Tensor, second: Tensor) -> Tensor:
        views = torch.cat([first, second])
        return info_nce(views, views, targets, scale=1 / TEMPERATURE, exclude=own).loss

    losses = {
        "eager": plain_nt_xent,
        **_originals(lightly=_lightly("NTXentLoss")),
        OP_ALONE: alone,
        "ours": nn.NTXentLoss(TEMPERATURE),
    }
    return _problem(case, (first, second), losses)


def prepare_decoupled(case: LossCase, device: torch.device) -> Problem:
    first, second = (view[: case.rows // 2].detach().requires_grad_() for view in _features(case, device, 2))

    def plain(first: Tensor, second: Tensor) -> Tensor:
        first, second = (F.normalize(view.float(), dim=1) for view in (first, second))
        loss = 0
        for one, other in ((first, second), (second, first)):
            logits = torch.cat([one @ one.T, one @ other.T], 1) / TEMPERATURE
            left_out = torch.eye(len(one), dtype=torch.bool, device=one.device).repeat(1, 2)
            positives = (one * other).sum(1) / TEMPERATURE
            loss = loss + (logits.masked_fill(left_out, -math.inf).logsumexp(1) - positives).mean() / 2
        return loss

    losses = {
        "eager": plain,
        **_originals(lightly=_lightly("DCLLoss")),
        "ours": nn.DecoupledContrastiveLoss(TEMPERATURE),
    }
    return _problem(case, (first, second), losses)


def _cases(*sizes: tuple[int, int], quick: tuple[int, int] = (256, 64)) -> list[LossCase]:
    return [LossCase(*quick, backward=True, quick=True), *(LossCase(*size, backward=True) for size in sizes)]


LARGE, SMALL = (4096, 512), (2048, 128)
LOSSES = (
    Op("symmetric", "compute", "", _cases(LARGE), prepare_symmetric),
    Op("CLIPLoss", "compute", "", _cases(LARGE), prepare_clip),
    Op("SigLIPLoss", "compute", "", _cases(LARGE), prepare_siglip),
    Op("SupConLoss", "compute", "", _cases(LARGE), prepare_sup_con),
    Op("LabelledNTXentLoss", "compute", "", _cases((512, 128)), prepare_labelled),
    Op("NTXentLoss", "compute", "", _cases(SMALL, (8192, 128)), prepare_nt_xent),
    Op("DecoupledContrastiveLoss", "compute", "", _cases(SMALL), prepare_decoupled),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [op.name for op in LOSSES]
    parser.add_argument("--loss", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--repeats", type=at_least(2), default=9, help="maximum number of rounds over all alternatives (default 9)"
    )
    add_common_arguments(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    document: dict[str, Any] = {"machine": describe(arguments.device), "complete": False, "results": []}
    out = None if arguments.out is None else result_file(arguments.out, arguments.device, "contrastive-losses")
    for op in LOSSES:
        for case in op.cases:
            if op.name not in arguments.loss or case.quick != arguments.quick:
                continue
            row = measure(op, case, arguments.device, arguments.repeats)
            print_row(row)
            document["results"].append(row)
            if out is not None:
                write_json(out, document)
    if out is not None:
        document["complete"] = True
        write_json(out, document)
        print(f"written: {out}")


if __name__ == "__main__":
    main()
