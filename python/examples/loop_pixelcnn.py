"""A PixelCNN, a gated one or PixelCNN++ in a training loop of your own, with samples.

    python python/examples/loop_pixelcnn.py [--model pixelcnn++] [--steps 300] [--samples samples.png]

To use it, replace the generated textures by your images, uint8 [C, H, W] and all of one size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import make_textures
from cpc_ext.figures import save_images
from cpc_ext.models import GatedPixelCNN, PixelCNN, PixelCNNPP

MODELS = {
    "pixelcnn": lambda: PixelCNN(3, hidden_channels=24, layers=5),
    "gated-pixelcnn": lambda: GatedPixelCNN(3, channels=24, layers=5),
    "pixelcnn++": lambda: PixelCNNPP(3, channels=24, blocks=1, mixtures=5, dropout=0.0),
}


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gated-pixelcnn", help="default gated-pixelcnn")
    parser.add_argument("--images", type=int, default=2000, help="number of textures to generate (default 2000)")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels (default 32)")
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=Path, help="PNG file for samples of the trained model")
    options = parser.parse_args(arguments)
    if options.model == "pixelcnn++" and options.side % 4:
        parser.error("--side: a multiple of 4 for pixelcnn++")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.from_numpy(make_textures(options.images, size=options.side).images)
    loader = DataLoader(TensorDataset(images), options.batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        parser.error("--images: fewer than a batch")
    model = MODELS[options.model]().to(device)
    if isinstance(model, PixelCNNPP):
        # Data-dependent initialization of its scales and biases.
        model.initialize(images[: options.batch_size].to(device))
    optimizer = torch.optim.Adam(model.parameters(), options.lr)

    bits: list[float] = []
    while len(bits) < options.steps:
        for (batch,) in loader:
            loss = model.bits_per_dim(batch.to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bits.append(loss.item())
            if len(bits) % 20 == 0 or len(bits) == options.steps:
                print(f"step {len(bits)}: {bits[-1]:.3f} bits per dimension")
            if len(bits) == options.steps:
                break

    if options.samples is not None:
        model.eval()
        save_images(options.samples, model.sample(16, options.side).cpu().numpy())
    return bits


if __name__ == "__main__":
    main()
