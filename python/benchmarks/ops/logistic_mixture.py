"""logistic_mixture_nll against the likelihood written out in PyTorch, in both memory formats.

The bytes are those of the images, of the parameters, once for each pass, and of their gradient. A formulation that
leaves intermediate results in memory moves many times as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark import Case, Op, Problem, both_passes, compiled
from torch import Tensor

from cpc_ext.ops import logistic_mixture_nll


def plain_likelihood(images: Tensor, params: Tensor) -> Tensor:
    """Compute the likelihood in plain PyTorch, with all three forms of a value's mass for each colour and component."""
    batch, channels, height, width = images.shape
    x = images.float().permute(0, 2, 3, 1) / 127.5 - 1
    params = params.permute(0, 2, 3, 1).float()
    components = params.shape[-1] // (10 if channels == 3 else 3)
    logits, rest = params[..., :components], params[..., components:]
    rest = rest.reshape(batch, height, width, channels, -1)
    means, log_scales, *coefficients = rest.split(components, dim=-1)
    log_scales = log_scales.clamp(min=-7)
    x = x.unsqueeze(-1)
    if coefficients:
        (shift,) = coefficients[0].tanh().split(3, dim=-2)
        green = means[..., 1:2, :] + shift[..., 0:1, :] * x[..., 0:1, :]
        blue = means[..., 2:3, :] + shift[..., 1:2, :] * x[..., 0:1, :] + shift[..., 2:3, :] * x[..., 1:2, :]
        means = torch.cat([means[..., 0:1, :], green, blue], dim=-2)
    centred = x - means
    inverse = torch.exp(-log_scales)
    plus, minus, middle = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255), inverse * centred
    mass = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2 * F.softplus(middle) - math.log(127.5)
    inside = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
    log_mass = torch.where(x > 0.999, -F.softplus(minus), inside)
    log_mass = torch.where(x < -0.999, plus - F.softplus(plus), log_mass)
    joint = log_mass.sum(dim=-2) + F.log_softmax(logits, dim=-1)
    return -joint.logsumexp(dim=-1).sum(dim=(1, 2))


@dataclass(frozen=True)
class MixtureCase(Case):
    """A batch of square images and the parameters of some components at every pixel."""

    batch: int
    channels: int
    side: int
    components: int
    layout: str = "channels last"

    @property
    def label(self) -> str:
        size = f"[{self.batch},{self.channels},{self.side},{self.side}]"
        return f"{size} {self.components} components, {self.layout}"

    @property
    def size(self) -> int:
        return self.batch


def prepare(case: MixtureCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    shape = case.batch, case.channels, case.side, case.side
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    channels = case.components * (10 if case.channels == 3 else 3)
    params = torch.randn(case.batch, channels, case.side, case.side, device=device).to(dtype)
    if case.layout == "channels last":
        params = params.to(memory_format=torch.channels_last)
    params.requires_grad_(case.backward)
    plain_compiled = compiled(plain_likelihood)

    def run(likelihood) -> Tensor:
        nll = likelihood(images, params)
        return torch.autograd.grad(nll.sum(), params)[0] if case.backward else nll

    return Problem(
        {
            "eager": lambda: run(plain_likelihood),
            "compiled": lambda: run(plain_compiled),
            "ours": lambda: run(logistic_mixture_nll),
        },
        (images.nbytes + params.nbytes) * (2 if case.backward else 1) + (params.nbytes if case.backward else 0),
    )


CASES = (
    # PixelCNN++ on CIFAR-10, over the batch.
    *(
        case
        for batch in (4, 16, 64, 256)
        for case in both_passes(MixtureCase, batch, 3, 32, 10, sweep=True, quick=batch == 16)
    ),
    *both_passes(MixtureCase, 64, 3, 32, 10, "channels first"),
    *both_passes(MixtureCase, 64, 3, 32, 10, dtype="bfloat16"),
    # Grey digits.
    *both_passes(MixtureCase, 64, 1, 28, 5),
)

OPS = (Op("logistic_mixture_nll", "memory", "images [3, 32, 32], 10 components", CASES, prepare),)
