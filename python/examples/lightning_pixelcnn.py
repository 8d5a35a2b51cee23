"""A PixelCNN, a gated one or PixelCNN++ as a LightningModule.

    python python/examples/lightning_pixelcnn.py [--model pixelcnn++] [--steps 300]

The model is that of loop_pixelcnn.py. Copy both files, and replace the generated data by yours. This needs
`pip install lightning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning
import torch
from loop_pixelcnn import MODELS
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import make_textures
from cpc_ext.models import PixelCNNPP


class LitPixelCNN(lightning.LightningModule):
    """Trains a PixelCNN on uint8 images [B, C, H, W], by their bits per dimension."""

    def __init__(self, model: torch.nn.Module, lr: float = 2e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        bits = self.model.bits_per_dim(batch[0])
        self.log("bits_per_dim", bits, prog_bar=True)
        return bits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def main(arguments: Sequence[str] | None = None) -> LitPixelCNN:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gated-pixelcnn", help="default gated-pixelcnn")
    parser.add_argument("--images", type=int, default=2000, help="number of textures to generate (default 2000)")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels (default 32)")
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="32-true", help="precision, such as bf16-mixed (default 32-true)")
    options = parser.parse_args(arguments)
    if options.model == "pixelcnn++" and options.side % 4:
        parser.error("--side: a multiple of 4 for pixelcnn++")

    lightning.seed_everything(0)
    images = torch.from_numpy(make_textures(options.images, size=options.side).images)
    loader = DataLoader(TensorDataset(images), options.batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        parser.error("--images: fewer than a batch")
    module = LitPixelCNN(MODELS[options.model]())
    if isinstance(module.model, PixelCNNPP):
        # Data-dependent initialization of its scales and biases.
        module.model.initialize(images[: options.batch_size])
    trainer = lightning.Trainer(max_steps=options.steps, precision=options.precision, log_every_n_steps=20)
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    main()
