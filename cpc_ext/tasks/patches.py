"""Patches of images for models that predict patches: their view, encoder and figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext import figures
from cpc_ext.data import Dataset, PatchAugmentation, PatchView
from cpc_ext.data.spread import spread
from cpc_ext.tasks.encoder_names import EncoderSpec, encoder_spec
from cpc_ext.tasks.patch_options import PredictionConfig
from cpc_ext.training.precision import patch_dtype
from cpc_ext.training.run_dir import RunDir

__all__ = ["center_or_random", "patch_encoder", "patch_view", "save_patch_figures"]

# Images the figures are drawn from.
_FIGURE_INPUTS = 4
_NEIGHBOUR_IMAGES = 500
_ENCODED = 32  # Images that are encoded at a time.
_NEIGHBOUR_QUERIES = 6
_NEIGHBOURS = 8


def patch_view(config: PredictionConfig, dataset: Dataset) -> PatchView:
    """Return the view that turns a run's images into patches. ValueError if the images are smaller than the crop."""
    options = config.view
    side = min(dataset.image_shape[1:])
    if options.crop > side + 2 * options.pad:
        raise ValueError(
            f"--crop {options.crop} is larger than the images of {dataset.name}, {side} pixels"
            + (f" and --pad {options.pad} around them" if options.pad else "")
        )
    return PatchView.of(
        dataset,
        options.patch,
        options.stride,
        crop=options.crop,
        pad=options.pad,
        flip=options.flip,
        gray=options.gray,
        patch_norm=options.patch_norm,
        augmentation=PatchAugmentation() if options.patch_augmentation else None,
        dtype=patch_dtype(config.compute.precision),
        channels_last=config.compute.channels_last,
    )


def patch_encoder(config: PredictionConfig, dataset: Dataset) -> EncoderSpec:
    """Return the specification of a run's patch encoder."""
    patch = config.view.patch
    return encoder_spec(
        config.cpc.encoder,
        norm=config.cpc.norm,
        in_channels=1 if config.view.gray else dataset.image_shape[0],
        # The stem should see a good part of a patch, but not all of it.
        stem="cifar" if patch <= 12 else "stl10" if patch <= 32 else "imagenet",
        patch_size=patch,
    )


def center_or_random(view: PatchView, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the patches [B, rows, cols, C', p, p] of uint8 images [B, C, H, W] for evaluating an encoder.

    generator: CPU generator of random crops and flips; None takes the central crop.
    """
    if generator is None:
        return view.center(images)
    # Augmenting each patch on its own serves the contrastive loss; a classifier needs what the patches have in common.
    return replace(view, augmentation=None).random(images, generator)


def save_patch_figures(
    run: RunDir,
    view: PatchView,
    shown: Callable[[int], tuple[Tensor, np.ndarray | None]],
    encodings: Callable[[Tensor], Tensor],
    seed: int,
) -> None:
    """Draw a model's inputs, and the patches whose encodings it finds most similar. OSError if writing fails.

    shown: returns at most the given number of images, uint8 [N, C, H, W], with their labels, or None without any.
    encodings: maps such images to [N, D, rows, cols]. seed: seed of the augmentations.
    """
    images, _ = shown(_FIGURE_INPUTS)
    _save_inputs(run, view, images, seed)
    images, labels = shown(_NEIGHBOUR_IMAGES)
    if len(images) >= _NEIGHBOUR_QUERIES + _NEIGHBOURS:
        # All images may have tens of thousands of patches: too many at once for a GPU with room for just a batch.
        encoded = torch.cat([encodings(some) for some in images.split(_ENCODED)])
        _save_neighbours(run, view, images, labels, encoded)


def _save_inputs(run: RunDir, view: PatchView, images: Tensor, seed: int) -> None:
    assert isinstance(view.crop, int)  # The options allow only square crops.
    patches = view.augmented(images, torch.Generator().manual_seed(seed)).float().cpu().numpy()
    figures.save(run.path / "inputs.png", figures.model_inputs(images.cpu().numpy(), patches, crop=view.crop))


def _save_neighbours(
    run: RunDir, view: PatchView, images: Tensor, labels: np.ndarray | None, encodings: Tensor
) -> None:
    """Draw the middle patch of a few images, each beside the most similar patches of other images, one per image."""
    rows, columns = encodings.shape[2:]
    middle = rows // 2 * columns + columns // 2
    encodings = encodings.flatten(2)  # [N, D, patches]
    # The mean is subtracted, since what all patches share would make them all similar.
    encodings = F.normalize(encodings - encodings.mean((0, 2), keepdim=True), dim=1)
    queries = torch.from_numpy(spread(_NEIGHBOUR_QUERIES, len(images))).to(encodings.device)
    similarity, patch = torch.einsum("qd,ndp->qnp", encodings[queries, :, middle], encodings).max(2)
    similarity[torch.arange(len(queries), device=queries.device), queries] = -torch.inf
    similarity, image = similarity.topk(_NEIGHBOURS, dim=1)
    patch = patch.gather(1, image)

    # Shown in colour and without normalisation, so that one sees what the encoding does not depend on.
    plain = replace(view, gray=False, mean=None, std=None, patch_norm=False, dtype=torch.float32)

    def shown(which: Tensor, patch: Tensor) -> np.ndarray:
        """Return one patch of each of some images, [n, C, p, p]."""
        patches = plain.center(images[which]).flatten(1, 2)
        return patches[torch.arange(len(which), device=images.device), patch].cpu().numpy()

    same_class = None
    if labels is not None:
        same_class = labels[queries.cpu().numpy(), None] == labels[image.cpu().numpy()]
    figures.save(
        run.path / "neighbours.png",
        figures.nearest_patches(
            shown(queries, torch.full_like(queries, middle)),
            np.stack([shown(*nearest) for nearest in zip(image, patch, strict=True)]),
            similarity.cpu().numpy(),
            same_class,
        ),
    )
