"""SimCLR, MoCo or SupCon in a training loop of your own: contrastive learning with views of images.

    python python/examples/loop_simclr.py [--model moco | supcon] [--steps 300] [--out encoder.pt]

To use it, replace the generated textures by your images, uint8 [C, H, W] and all of one size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import SimCLRView, make_textures
from cpc_ext.models import MoCo, ResNetV2Encoder, SimCLR, SupCon

# The encoder of the default runs; ResNetV2Encoder(14) is a larger one.
SMALL = {"blocks": (1, 1, 1), "channels": (32, 64, 128), "stem_channels": 32, "stem": "strided"}
MODELS = ("simclr", "moco", "supcon")


def make_model(name: str = "simclr") -> tuple[SimCLR | MoCo | SupCon, SimCLRView]:
    """Return the model, and the view that makes its input of images."""
    encoder = ResNetV2Encoder(**SMALL, in_channels=3, norm="batch")
    model: SimCLR | MoCo | SupCon
    if name == "moco":  # The queue holds 16 batches of 64; key networks follow within some hundred steps.
        model = MoCo(encoder, projection_channels=128, temperature=0.2, queue_size=1024, momentum=0.99)
    elif name == "supcon":
        model = SupCon(encoder, projection_channels=128, temperature=0.2)
    else:
        model = SimCLR(encoder, projection_channels=128, temperature=0.2)
    return model, SimCLRView(48, min_area=0.2, blur_kernel=5, mean=(0.5,) * 3, std=(0.2,) * 3)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="simclr")
    parser.add_argument("--images", type=int, default=2000, help="number of textures to generate (default 2000)")
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="file to save the encoder's weights to")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawn = make_textures(options.images, size=64)
    images, labels = torch.from_numpy(drawn.images), torch.from_numpy(drawn.labels)
    loader = DataLoader(TensorDataset(images, labels), options.batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        parser.error("--images: fewer than a batch")
    model, view = make_model(options.model)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=1e-4)

    losses: list[float] = []
    while len(losses) < options.steps:
        for batch, classes in loader:
            views = view.random_pair(batch.to(device))
            output = model(views, classes.to(device)) if isinstance(model, SupCon) else model(views)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            if isinstance(model, MoCo):
                model.follow()  # Updates the key networks after every update of the weights.
            losses.append(output.loss.item())
            if len(losses) % 20 == 0 or len(losses) == options.steps:
                print(f"step {len(losses)}: loss {losses[-1]:.3f}, accuracy {output.accuracy.item():.1%}")
            if len(losses) == options.steps:
                break

    model.eval()
    with torch.no_grad():
        features = model.encode(view.center(images[:100].to(device)))
    print(f"features of images, for a probe: {list(features.shape)}")
    if options.out is not None:
        torch.save(model.encoder.state_dict(), options.out)
    return losses


if __name__ == "__main__":
    main()
