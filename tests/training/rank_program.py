"""One of several processes: compares losses and gradients of a part of a batch with those of the whole batch.

Arguments: rank, number of processes, rendezvous file, file for the result (JSON). This is not a test by itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpc_ext.models import CPC, GatedPixelCNNContext, ResidualContext, ResNetV2Encoder, SimCLR, SupCon
from cpc_ext.models.supcon import SupConOutput
from cpc_ext.nn import TargetInfoNCE, across_ranks, gather_from_ranks, grad_cache
from cpc_ext.ops import InfoNCEOutput, info_nce

IMAGES = 6


def encoder() -> ResNetV2Encoder:
    return ResNetV2Encoder(blocks=(1,), channels=(6,), stem_channels=4, in_channels=1, norm="layer", stem="cifar")


def cpc(neg_samples: int | str, exchange: str) -> nn.Module:
    network = encoder()
    return CPC(
        network,
        GatedPixelCNNContext(network.out_channels, 1),
        pred_steps=2,
        pred_directions=2,
        neg_samples=neg_samples,
        gather_negatives=exchange,
    )


def cpc_v2(exchange: str) -> nn.Module:
    network = encoder()
    channels = network.out_channels
    objective = TargetInfoNCE(
        channels, pred_steps=2, pred_directions=2, target_channels=5, scale=0.3, gather_negatives=exchange
    )
    return CPC(network, [ResidualContext(channels, 4, 1) for _ in range(2)], objective)


def simclr(exchange: str) -> nn.Module:
    return SimCLR(encoder(), projection_channels=5, temperature=0.2, gather_negatives=exchange)


class SupConOfImages(nn.Module):
    """Supervised contrast of images whose class is the sign of their sum."""

    def __init__(self, exchange: str) -> None:
        super().__init__()
        self.model = SupCon(encoder(), projection_channels=5, temperature=0.2, gather_negatives=exchange)

    def forward(self, views: Tensor) -> SupConOutput:
        return self.model(views, (views[0].flatten(1).sum(1) > 0).long())


class Contrast(nn.Module):
    """Two linear encoders and a learned scale; images are contrasted with those of other processes."""

    def __init__(self, exchange: str) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(16, 5), nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.exchange = exchange

    def forward(self, batch: Tensor) -> InfoNCEOutput:
        queries, keys = self.queries(batch), self.keys(batch)
        exchange = across_ranks.exchange_with(self.exchange)
        own = torch.arange(len(batch)) + exchange.own_of(len(batch)).start
        if exchange.ring:
            losses, rank = across_ranks.ring_info_nce(queries, keys, own, scale=self.scale)
        else:
            every = exchange.gathered(keys)
            losses, _, rank = info_nce(queries, every, own, scale=self.scale, reduction="none")
        return InfoNCEOutput(losses.mean(), (rank == 0).to(losses.dtype).mean(), rank)


CASES: dict[str, tuple[Callable[[str], nn.Module], int, str]] = {
    # By name: a function that makes the model, the dimension of images in its batch, and the exchange of keys.
    "cpc-sampled-gather": (lambda exchange: cpc(5, exchange), 0, "gather"),
    "cpc-all-gather": (lambda exchange: cpc("all", exchange), 0, "gather"),
    "cpc-all-ring": (lambda exchange: cpc("all", exchange), 0, "ring"),
    "cpc_v2-gather": (cpc_v2, 0, "gather"),
    "cpc_v2-ring": (cpc_v2, 0, "ring"),
    "simclr-gather": (simclr, 1, "gather"),
    "simclr-ring": (simclr, 1, "ring"),
    "supcon-gather": (SupConOfImages, 1, "gather"),
    "contrast-gather": (Contrast, 0, "gather"),
    "contrast-ring": (Contrast, 0, "ring"),
}


def run(model: nn.Module, batch: Tensor, scalars: list[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the scalars that the model outputs, and the gradients of its loss."""
    draws = {"generator": torch.Generator().manual_seed(3)} if "cpc" in scalars else {}
    output = model(batch, **draws)
    output.loss.backward()
    values = {name: getattr(output, name).detach() for name in scalars if hasattr(output, name)}
    return values, [parameter.grad for parameter in model.parameters()]


def in_chunks(rank: int, world: int) -> dict[str, float]:
    """Compare encoders under DistributedDataParallel, differentiated in chunks, with the whole batch."""
    torch.manual_seed(0)
    encoder, other = nn.Linear(16, 5).double(), nn.Linear(16, 5).double()
    batch = torch.randn(IMAGES, 16, dtype=torch.float64)
    info_nce(encoder(batch), other(batch)).loss.backward()
    parameters = [*encoder.parameters(), *other.parameters()]
    whole = [parameter.grad for parameter in parameters]
    encoder.zero_grad()
    other.zero_grad()
    part = batch.chunk(world)[rank]
    own = torch.arange(len(part)) + rank * len(part)
    loss = grad_cache(
        lambda queries, keys: info_nce(queries, gather_from_ranks(keys), own).loss,
        [DistributedDataParallel(one) for one in (encoder, other)],
        [part, part],
        1,
    )
    dist.all_reduce(loss)
    gradients = zip(parameters, whole, strict=True)
    return {
        "loss": abs(loss / world - info_nce(encoder(batch), other(batch)).loss).item(),
        "gradients": max((one.grad - expected).abs().max().item() for one, expected in gradients),
        "largest_gradient": max(gradient.abs().max().item() for gradient in whole),
    }


def main(rank: int, world: int, meeting: str, answer: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    results = {}
    for name, (build, dim, exchange) in CASES.items():
        torch.manual_seed(0)
        model = build("none").double()
        shape = (2, IMAGES, 1, 8, 8) if dim else (IMAGES, 4, 4, 1, 8, 8) if "cpc" in name else (IMAGES, 16)
        batch = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        scalars = ["loss", "accuracy", "mutual_information", "top5_accuracy", "mean_position", name.partition("-")[0]]
        whole_values, whole_gradients = run(model, batch, scalars)

        shared = build(exchange).double()
        shared.load_state_dict(model.state_dict())
        values, gradients = run(DistributedDataParallel(shared), batch.chunk(world, dim)[rank], scalars)
        for value in values.values():
            dist.all_reduce(value)
            value /= world
        results[name] = {
            **{scalar: abs(values[scalar] - whole_values[scalar]).item() for scalar in values},
            "gradients": max(
                (one - other).abs().max().item() for one, other in zip(gradients, whole_gradients, strict=True)
            ),
            "largest_gradient": max(gradient.abs().max().item() for gradient in whole_gradients),
        }
    results["chunks"] = in_chunks(rank, world)
    dist.barrier()
    if rank == 0:
        with open(answer, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    os._exit(0)  # PyTorch keeps the threads of a group that DistributedDataParallel knew: they may abort Python's end.
