"""Inputs of the first module that learns: patches, or the outputs of the frozen modules before it.

The outputs are computed in every step, or once for all steps and read from the disk.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from cpc_ext.data import ImageSet, PatchView
from cpc_ext.models import GreedyInfoMax, GreedySupervised
from cpc_ext.tasks.greedy_infomax.options import GreedyConfig
from cpc_ext.tasks.greedy_infomax.output_cache import OutputCache
from cpc_ext.training.digests import images_digest, weights_digest
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.precision import autocast
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Fetcher

__all__ = ["ModuleInputs"]


class ModuleInputs:
    """The inputs of the first module that learns.

    Args:
        model: the model, of whose modules some may be frozen.
        images: training images.
        view: turns images into patches.
    """

    def __init__(
        self,
        model: GreedyInfoMax | GreedySupervised,
        images: ImageSet,
        view: PatchView,
        config: GreedyConfig,
        device: torch.device,
    ) -> None:
        self._model = model
        self._images = images
        self._view = view
        self._config = config
        self._device = device
        self._key: str | None = None

    def __call__(self, batch: Tensor, streams: RandomStreams) -> Tensor:
        """Return feature maps [N, D, h, w] of uint8 images [B, C, H, W], or of a batch of :meth:`cached_fetcher`."""
        if self._key is not None:
            return batch.flatten(0, 1)
        patches = self._view.random(batch, streams.views, share=streams.share)
        if self._model.frozen == 0:
            return patches.flatten(0, 2)
        return self._frozen_outputs(patches).flatten(0, 1)

    def prepare(self, ranks: Ranks) -> None:
        """Fill the cache if the run keeps one. TrainingError if it cannot be written."""
        options = self._config.greedy
        if options.cache_outputs is None:
            return
        key = self._cache_key()
        generator = torch.Generator().manual_seed(self._config.compute.seed)
        ranks.on_main(
            lambda: OutputCache.fill(
                self._cache_path,
                key,
                self._images,
                lambda images: self._frozen_outputs(self._view.random(images, generator)),
                self._device,
                views=options.cache_views,
            )
        )
        self._key = key

    def cached_fetcher(self, device: torch.device, streams: RandomStreams) -> Fetcher | None:
        """Return the fetcher of batches from the cache; None without a cache."""
        if self._key is None:
            return None
        return OutputCache(self._cache_path, self._key, self._images, device, streams)

    @torch.no_grad()
    def _frozen_outputs(self, patches: Tensor) -> Tensor:
        """Return the last frozen module's feature maps [B, rows·cols, D, h, w] of patches [B, rows, cols, C, p, p]."""
        features = patches.flatten(0, 2)
        with autocast(self._device, self._config.compute.precision):
            for module in self._model.encoder_modules[: self._model.frozen]:
                features = module(features)
        return torch.unflatten(features, 0, (len(patches), -1))

    @property
    def _cache_path(self) -> Path:
        folder = self._config.greedy.cache_outputs
        assert folder is not None  # Only runs with a cache need the path.
        return folder / f"module-{self._model.frozen - 1}.bin"

    def _cache_key(self) -> str:
        """Return a hash of everything that the frozen modules' outputs depend on."""
        origin = {
            "images": images_digest(ImageSet(self._images.images)),
            "weights": weights_digest(nn.ModuleList(self._model.encoder_modules[: self._model.frozen])),
            "view": repr(self._view),
            "views": self._config.greedy.cache_views,
            "seed": self._config.compute.seed,
            "precision": self._config.compute.precision,
        }
        return hashlib.sha256(repr(origin).encode()).hexdigest()
