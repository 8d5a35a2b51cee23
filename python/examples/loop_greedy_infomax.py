"""Greedy InfoMax in a training loop of your own: modules with separate losses, one after another in each step.

    python python/examples/loop_greedy_infomax.py [--steps 300] [--out encoder.pt]

To use it, replace the generated textures by your images, uint8 [C, H, W] and all of one size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import PatchView, make_textures
from cpc_ext.models import GreedyInfoMax, ResNetV2Encoder

# The encoder of the default runs; ResNetV2Encoder(14) is a larger one.
SMALL = {"blocks": (1, 1, 1), "channels": (32, 64, 128), "stem_channels": 32, "stem": "strided"}


def make_model() -> tuple[GreedyInfoMax, PatchView]:
    """Return the model, and the view that turns images into its input."""
    encoder = ResNetV2Encoder(**SMALL, in_channels=1, norm="layer")
    model = GreedyInfoMax(encoder, 3, pred_steps=3, neg_samples=16)
    return model, PatchView(16, 8, crop=56, gray=True, patch_norm=True)


def main(arguments: Sequence[str] | None = None) -> list[list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="number of textures to generate (default 2000)")
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="file to save the encoder's weights to")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.from_numpy(make_textures(options.images, size=64).images)
    loader = DataLoader(TensorDataset(images), options.batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        parser.error("--images: fewer than a batch")
    model, view = make_model()
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), options.lr)

    losses: list[list[float]] = []
    while len(losses) < options.steps:
        for (batch,) in loader:
            optimizer.zero_grad()
            found = []
            # A module runs when its output is requested, so that only one has its activations in memory at a time.
            for output in model.outputs(view.random(batch.to(device))):
                output.loss.backward()
                found.append(output.loss.item())
            # Adam updates every parameter independently, so that one optimizer equals one for each module.
            optimizer.step()
            losses.append(found)
            if len(losses) % 20 == 0 or len(losses) == options.steps:
                print(f"step {len(losses)}: losses {', '.join(f'{loss:.3f}' for loss in found)}")
            if len(losses) == options.steps:
                break

    with torch.no_grad():
        modules = model.encodings_by_module(view.center(images[:100].to(device)))
    print(f"features after each module, for probes: {[list(each.mean((2, 3)).shape) for each in modules]}")
    if options.out is not None:
        torch.save(model.encoder.state_dict(), options.out)
    return losses


if __name__ == "__main__":
    main()
