"""Greedy InfoMax as a LightningModule: modules with separate losses.

    python python/examples/lightning_greedy_infomax.py [--steps 300]

The model is that of loop_greedy_infomax.py. Copy both files, and replace the generated data by yours. This needs
`pip install lightning`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning
import torch
from loop_greedy_infomax import make_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cpc_ext.data import PatchView, make_textures
from cpc_ext.models import GreedyInfoMax


class LitGreedyInfoMax(lightning.LightningModule):
    """Trains Greedy InfoMax on uint8 images [B, C, H, W]; back-propagates one module's loss after another."""

    def __init__(self, model: GreedyInfoMax, view: PatchView, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.view, self.lr = model, view, lr
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        # A module runs when its output is requested, so that only one has its activations in memory at a time.
        for number, output in enumerate(self.model.outputs(self.view.random(batch[0]))):
            self.manual_backward(output.loss)
            self.log(f"loss_module_{number}", output.loss, prog_bar=True)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def main(arguments: Sequence[str] | None = None) -> LitGreedyInfoMax:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    module = LitGreedyInfoMax(*make_model())
    trainer = lightning.Trainer(max_steps=options.steps, precision=options.precision, log_every_n_steps=20)
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    main()
