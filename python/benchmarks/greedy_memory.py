"""Peak memory of a training step of CPC end to end, and of Greedy InfoMax with all modules or only one.

All train the same encoder, Löwe et al. 2019's ResNet-50 v2 without its last stack and without norm, on 7x7 patches of
16x16 pixels. Memory that is allocated during the whole step, weights and Adam's two moments of trained weights, is
counted separately from the peak of activations and gradients that a step adds. The fair rival is CPC with recomputed
activations of its residual blocks (``torch.utils.checkpoint``), which costs a second forward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from machine import add_common_arguments, at_least, describe, result_file, write_json
from memory import peak_extra_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpc_ext.models import GatedPixelCNNContext, GreedyInfoMax, ResNetV2Encoder

# The published settings.
ENCODER: dict[str, Any] = {"depth": 41, "in_channels": 1}
QUICK_ENCODER: dict[str, Any] = {"blocks": (1, 1, 1), "bottleneck": True, "channels": (8, 16, 32), "in_channels": 1}
GRID, PATCH, PRED_STEPS, NEG_SAMPLES = 7, 16, 5, 16
ADAM_MOMENTS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="B", help="images per step (default 8, 2 with --quick)"
    )
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.batch_size is None:
        arguments.batch_size = 2 if arguments.quick else 8
    return arguments


def make_model(encoder: dict[str, Any], modules: int, device: str, *, with_context: bool = False) -> GreedyInfoMax:
    torch.manual_seed(0)
    network = ResNetV2Encoder(**encoder)
    context = GatedPixelCNNContext(network.out_channels) if with_context else None
    model = GreedyInfoMax(network, modules, context=context, pred_steps=PRED_STEPS, neg_samples=NEG_SAMPLES)
    model.encoder.to(memory_format=torch.channels_last)
    return model.to(device)


def recompute_blocks(model: GreedyInfoMax) -> None:
    """Keep only a block's input for the backward pass, and run the block again there."""
    for stack in model.encoder.stacks:
        for block in stack:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def measure(name: str, model: GreedyInfoMax, step: Callable[[], None], device: str) -> dict[str, Any]:
    """Return the bytes of a step: those allocated throughout, and the peak that it adds.

    Parameters count as trained if they require a gradient.
    """
    trained = bytes_of(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.zero_grad(set_to_none=True)
    result = {
        "name": name,
        "weights_and_moments": bytes_of(model.parameters()) + ADAM_MOMENTS * trained,
        "step_peak": peak_extra_bytes(step, device),
    }
    result["total"] = result["weights_and_moments"] + result["step_peak"]
    print(
        f"{name:<52}{result['weights_and_moments'] / 2**20:>10.0f}{result['step_peak'] / 2**20:>12.0f}"
        f"{result['total'] / 2**20:>10.0f}",
        flush=True,
    )
    return result


def modules_in_turn(model: GreedyInfoMax, patches: Tensor) -> None:
    for output in model.outputs(patches):
        output.loss.backward()


def main(arguments: argparse.Namespace) -> None:
    device, encoder = arguments.device, QUICK_ENCODER if arguments.quick else ENCODER
    shape = (arguments.batch_size, GRID, GRID, PATCH, PATCH, 1)
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(0)).permute(0, 1, 2, 5, 3, 4).to(device)
    print(f"{arguments.batch_size} images, float32, MiB{'':<28}{'weights, Adam':>14}{'step':>9}{'total':>10}")

    results = []
    # CPC's context network has four layers as wide as the encoder's output, with more weights than the encoder.
    for name, with_context in (("CPC, end to end", True), ("the same without context network", False)):
        whole = make_model(encoder, 1, device, with_context=with_context)
        results.append(measure(name, whole, lambda model=whole: modules_in_turn(model, patches), device))
        recompute_blocks(whole)
        name += ", blocks run again"
        results.append(measure(name, whole, lambda model=whole: modules_in_turn(model, patches), device))
        del whole
    greedy = make_model(encoder, 3, device)

    def graphs_kept() -> None:
        sum(output.loss for output in greedy(patches)).backward()

    results.append(measure("3 modules, graphs kept to the end", greedy, graphs_kept, device))
    results.append(measure("3 modules at once", greedy, lambda: modules_in_turn(greedy, patches), device))
    for index in range(3):
        greedy.freeze(index)
        for module, objective in list(zip(greedy.encoder_modules, greedy.objectives, strict=True))[index + 1 :]:
            module.requires_grad_(False)
            objective.requires_grad_(False)
        results.append(
            measure(f"module {index} alone", greedy, lambda: next(greedy.outputs(patches)).loss.backward(), device)
        )
        greedy.requires_grad_(True)

    end_to_end = results[0]
    for result in results[1:]:
        print(
            f"{result['name']}: {end_to_end['step_peak'] / result['step_peak']:.2f} times less in the step, "
            f"{end_to_end['total'] / result['total']:.2f} in all"
        )
    if arguments.out is not None:
        out = result_file(arguments.out, device, "greedy-memory")
        write_json(
            out,
            {
                "machine": describe(device),
                "batch_size": arguments.batch_size,
                "complete": not arguments.quick,
                "results": results,
            },
        )
        print(f"written: {out}")


if __name__ == "__main__":
    main(parse_arguments())
