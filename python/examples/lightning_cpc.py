"""Contrastive predictive coding of images, version 1 or 2, as a LightningModule.

    python python/examples/lightning_cpc.py [--version 2] [--steps 300]

The model is that of loop_cpc.py. Copy both files, and replace the generated data by yours. This needs
`pip install lightning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning
import torch
from loop_cpc import make_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import PatchView, make_textures
from cpc_ext.models import CPC


class LitCPC(lightning.LightningModule):
    """Trains CPC on uint8 images [B, C, H, W], by predicting encodings of patches further down."""

    def __init__(self, model: CPC, view: PatchView, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.view, self.lr = model, view, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        output = self.model(self.view.random(batch[0]))
        self.log_dict({"loss": output.loss, "accuracy": output.accuracy}, prog_bar=True)
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def main(arguments: Sequence[str] | None = None) -> LitCPC:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="version of CPC (default 1)")
    parser.add_argument("--images", type=int, default=2000, help="number of textures to generate (default 2000)")
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="32-true", help="precision, such as bf16-mixed (default 32-true)")
    options = parser.parse_args(arguments)

    lightning.seed_everything(0)
    images = torch.from_numpy(make_textures(options.images, size=64).images)
    loader = DataLoader(TensorDataset(images), options.batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        parser.error("--images: fewer than a batch")
    module = LitCPC(*make_model(options.version))
    trainer = lightning.Trainer(max_steps=options.steps, precision=options.precision, log_every_n_steps=20)
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    main()
