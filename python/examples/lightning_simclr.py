"""SimCLR, MoCo or SupCon as a LightningModule: contrastive learning with views of images.

    python python/examples/lightning_simclr.py [--model moco | supcon] [--steps 300]

The models are those of loop_simclr.py. Copy both files, and replace the generated data by yours. This needs
`pip install lightning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from loop_simclr import MODELS, make_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import SimCLRView, make_textures
from cpc_ext.models import MoCo, SimCLR, SupCon


class LitSimCLR(lightning.LightningModule):
    """Trains a model on two views of uint8 images [B, C, H, W], with classes [B] for SupCon."""

    def __init__(self, model: SimCLR | MoCo | SupCon, view: SimCLRView, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.view, self.lr = model, view, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # Views are float32 until they are finished.
            views = self.view.random_pair(batch[0])
        output = self.model(views, batch[1]) if isinstance(self.model, SupCon) else self.model(views)
        self.log_dict({"loss": output.loss, "accuracy": output.accuracy}, prog_bar=True)
        return output.loss

    def on_train_batch_end(self, *batch: Any) -> None:
        if isinstance(self.model, MoCo):
            self.model.follow()  # Updates the key networks after every update of the weights.

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=1e-4)


def main(arguments: Sequence[str] | None = None) -> LitSimCLR:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="simclr")
    parser.add_argument("--images", type=int, default=2000, help="number of textures to generate (default 2000)")
    parser.add_argument("--steps", type=int, default=300, help="number of updates (default 300)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="32-true", help="precision, such as bf16-mixed (default 32-true)")
    options = parser.parse_args(arguments)

    lightning.seed_everything(0)
    drawn = make_textures(options.images, size=64)
    images, labels = torch.from_numpy(drawn.images), torch.from_numpy(drawn.labels)
    loader = DataLoader(TensorDataset(images, labels), options.batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        parser.error("--images: fewer than a batch")
    module = LitSimCLR(*make_model(options.model))
    trainer = lightning.Trainer(max_steps=options.steps, precision=options.precision, log_every_n_steps=20)
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    main()
