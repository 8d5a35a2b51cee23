"""The task of training CPC v1: grey or colour crops as grids of patches, contrastive loss, linear probe.

What it judges the encoder by is a probe on encodings averaged over the grid, against the same encoder untrained, whose
weights the seed brings back.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext import figures
from cpc_ext.data import Dataset, ImageFetcher, ImageSet, PatchAugmentation, PatchView
from cpc_ext.data.spread import spread
from cpc_ext.models import CPC, GatedPixelCNNContext, PatchEncoder
from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput
from cpc_ext.tasks.cpc_v1.options import CPCConfig
from cpc_ext.tasks.encoder_names import EncoderSpec, encoder_spec
from cpc_ext.tasks.encoder_task import EncoderTask, save_encoder
from cpc_ext.tasks.patch_options import PredictionConfig
from cpc_ext.training.precision import patch_dtype
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics

__all__ = ["TASK", "CPCv1Task"]

# Images the figures are drawn from.
_FIGURE_INPUTS = 4
_NEIGHBOUR_IMAGES = 500
_NEIGHBOUR_QUERIES = 6
_NEIGHBOURS = 8


class CPCv1Task(EncoderTask):
    """CPC v1 on a data set.

    Raises:
        ValueError: images smaller than the crop.
    """

    _config: PredictionConfig

    def __init__(self, config: CPCConfig, dataset: Dataset, device: torch.device) -> None:
        side = min(dataset.image_shape[1:])
        if config.view.crop > side + 2 * config.view.pad:
            raise ValueError(
                f"--crop {config.view.crop} is larger than the images of {dataset.name}, {side} pixels"
                + (f" and --pad {config.view.pad} around them" if config.view.pad else "")
            )
        self._config = config
        self._options_of_cpc = config.cpc
        self._dataset = dataset
        self._device = device
        self.images = dataset.pretrain
        self._view = PatchView.of(
            dataset,
            config.view.patch,
            config.view.stride,
            crop=config.view.crop,
            pad=config.view.pad,
            flip=config.view.flip,
            gray=config.view.gray,
            patch_norm=config.view.patch_norm,
            augmentation=PatchAugmentation() if config.view.patch_augmentation else None,
            dtype=patch_dtype(config.compute.precision),
            channels_last=config.compute.channels_last,
        )
        self.model = self._build()

    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        patches = self._view.random(images, streams.views, share=streams.share)
        output = self._contrast(patches, streams)
        return {"loss": output.loss, "accuracy": output.accuracy, "mutual_information": output.mutual_information}

    def _contrast(self, patches: Tensor, streams: RandomStreams) -> GridInfoNCEOutput:
        output: GridInfoNCEOutput = self.model(patches, generator=streams.negatives)
        return output

    def encode(self, model: EncoderModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        patches = self._view.center(images) if generator is None else self._view.random(images, generator)
        return model.encode(patches)

    def save(self, run: RunDir) -> None:
        save_encoder(run, self.model.encoder, self._encoder_spec(), self._view, self._config)
        metrics = read_metrics(run.metrics, having=("loss", "accuracy"))
        if metrics:
            figures.save(run.path / "curves.png", figures.curves(metrics, self._guessing()))
        self._save_inputs(run)
        self._save_neighbours(run)

    def _save_inputs(self, run: RunDir) -> None:
        images = self._shown_images(_FIGURE_INPUTS)
        generator = torch.Generator().manual_seed(self._config.compute.seed)
        patches = self._view.augmented(images, generator).float().cpu().numpy()
        figures.save(
            run.path / "inputs.png",
            figures.model_inputs(images.cpu().numpy(), patches, crop=self._config.view.crop),
        )

    def _save_neighbours(self, run: RunDir) -> None:
        """For the middle patch of a few images, the nearest patch of each of the images nearest to it."""
        images = self._shown_images(_NEIGHBOUR_IMAGES)
        if len(images) < _NEIGHBOUR_QUERIES + _NEIGHBOURS:
            return
        encodings = self.encodings(self.model, images).flatten(2)  # [N, D, patches]
        # What all patches share would make all of them alike.
        encodings = F.normalize(encodings - encodings.mean((0, 2), keepdim=True), dim=1)
        middle = self._config.view.grid_size // 2 * (self._config.view.grid_size + 1)
        queries = torch.from_numpy(spread(_NEIGHBOUR_QUERIES, len(images))).to(encodings.device)
        similarity, patch = torch.einsum("qd,ndp->qnp", encodings[queries, :, middle], encodings).max(2)
        similarity[torch.arange(len(queries), device=queries.device), queries] = -torch.inf
        similarity, image = similarity.topk(_NEIGHBOURS, dim=1)
        patch = patch.gather(1, image)

        # Shown in colour and without normalisation, so that one sees what the encoding does not depend on.
        plain = replace(self._view, gray=False, mean=None, std=None, patch_norm=False, dtype=torch.float32)
        patches = plain.center(images).flatten(1, 2)
        labels = self._shown_set.labels
        same_class = None
        if labels is not None:
            labels = labels[spread(_NEIGHBOUR_IMAGES, len(self._shown_set))]
            same_class = labels[queries.cpu().numpy(), None] == labels[image.cpu().numpy()]
        figures.save(
            run.path / "neighbours.png",
            figures.nearest_patches(
                patches[queries, middle].cpu().numpy(),
                patches[image, patch].cpu().numpy(),
                similarity.cpu().numpy(),
                same_class,
            ),
        )

    @property
    def _shown_set(self) -> ImageSet:
        return self._dataset.pretrain if self._dataset.test is None else self._dataset.test

    def _shown_images(self, count: int) -> Tensor:
        """Images from all of those that were not trained on, uint8 [N, C, H, W] on the device."""
        fetch = ImageFetcher(self._shown_set, self._device, resident=False)
        return fetch(spread(count, len(self._shown_set)))

    def _guessing(self) -> dict[str, float]:
        """Loss and accuracy of a model that finds all keys equally likely."""
        config, options = self._config, self._options_of_cpc
        if isinstance(options.neg_samples, str):  # "all"
            row = config.view.grid_size * config.optimization.batch_size
            rows = [config.view.grid_size - options.skip - step for step in range(1, options.pred_steps + 1)]
            keys = [row * count for count in rows]
        else:
            keys = [options.neg_samples + 1]
        return {
            "loss": sum(math.log(count) for count in keys) / len(keys),
            "accuracy": sum(1 / count for count in keys) / len(keys),
        }

    def _build(self) -> EncoderModel:
        """The model with the initial weights of the config's seed."""
        config = self._config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.compute.seed)
            encoder = self._encoder_spec().build(config.view.patch)
            model = self._cpc(encoder)
        if config.compute.channels_last:
            # Only the encoder: the other four-dimensional parameters are not filters over images.
            # PyTorch declares it beside a device only.
            encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self._device)

    def _cpc(self, encoder: PatchEncoder) -> EncoderModel:
        """The whole model around an encoder."""
        options = self._options_of_cpc
        return CPC(
            encoder,
            GatedPixelCNNContext(encoder.out_channels, options.context_layers),
            pred_steps=options.pred_steps,
            pred_directions=options.pred_directions,
            skip=options.skip,
            neg_samples=options.neg_samples,
            gather_negatives=options.gather_negatives,
        )

    def _encoder_spec(self) -> EncoderSpec:
        patch = self._config.view.patch
        return encoder_spec(
            self._config.cpc.encoder,
            norm=self._config.cpc.norm,
            in_channels=1 if self._config.view.gray else self._dataset.image_shape[0],
            # A stem sees a good part of a patch, not all of it.
            stem="cifar" if patch <= 12 else "stl10" if patch <= 32 else "imagenet",
            patch_size=patch,
        )


TASK = CPCv1Task
