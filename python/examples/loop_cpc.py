"""Contrastive predictive coding of images, version 1 or 2, in a training loop of your own.

    python python/examples/loop_cpc.py [--version 2] [--steps 300] [--out encoder.pt]

To use it, replace the generated textures by your images, uint8 [C, H, W] and all of one size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import PatchAugmentation, PatchView, make_textures
from cpc_ext.models import CPC, GatedPixelCNNContext, ResidualContext, ResNetV2Encoder
from cpc_ext.nn import TargetInfoNCE

# The encoder of the default runs; ResNetV2Encoder(14) is a larger one.
SMALL = {"blocks": (1, 1, 1), "channels": (32, 64, 128), "stem_channels": 32, "stem": "strided"}


def make_model(version: int) -> tuple[CPC, PatchView]:
    """Return the model, and the view that turns images into its input."""
    if version == 1:
        encoder = ResNetV2Encoder(**SMALL, in_channels=1, norm="layer")
        model = CPC(encoder, GatedPixelCNNContext(encoder.out_channels), pred_steps=3, neg_samples="all")
        # Grey patches, each normalised by its own mean and contrast, share only structure.
        return model, PatchView(16, 8, crop=56, gray=True, patch_norm=True)
    encoder = ResNetV2Encoder(**SMALL, in_channels=3, norm="layer")
    directions = 4
    model = CPC(
        encoder,
        [ResidualContext(encoder.out_channels, blocks=2) for _ in range(directions)],
        TargetInfoNCE(encoder.out_channels, pred_steps=3, pred_directions=directions),
    )
    # Every patch is augmented independently, so that its colours do not reveal its neighbours'.
    return model, PatchView(16, 8, crop=56, mean=(0.5,) * 3, std=(0.2,) * 3, augmentation=PatchAugmentation())


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="version of CPC (default 1)")
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
    model, view = make_model(options.version)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), options.lr)

    losses: list[float] = []
    while len(losses) < options.steps:
        for (batch,) in loader:
            output = model(view.random(batch.to(device)))
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            losses.append(output.loss.item())
            if len(losses) % 20 == 0 or len(losses) == options.steps:
                print(f"step {len(losses)}: loss {losses[-1]:.3f}, accuracy {output.accuracy.item():.1%}")
            if len(losses) == options.steps:
                break

    with torch.no_grad():
        features = model.encoder(view.center(images[:100].to(device))).mean((2, 3))
    print(f"features of images, for a probe: {list(features.shape)}")
    if options.out is not None:
        torch.save(model.encoder.state_dict(), options.out)
    return losses


if __name__ == "__main__":
    main()
