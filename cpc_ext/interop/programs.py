"""The public functions that read checkpoints of other programs as our models, and write models as their checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cpc_ext._found import found_in
from cpc_ext._messages import some
from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.reading import Checkpoint, read_checkpoint
from cpc_ext.interop.reference import Form, Program, Reference, Settings
from cpc_ext.training.atomic_file import atomic_file, write_text
from cpc_ext.training.checkpoint import write_tensors

__all__ = ["SOURCES", "export_reference", "load_reference", "read_reference", "save_reference"]

_PROGRAMS: dict[str, Program] = {
    source: import_module(module).PROGRAM for source, module in found_in("cpc_ext.interop.sources").items()
}

SOURCES = tuple(_PROGRAMS)


def load_reference(
    path_or_state_dict: str | Path | Mapping[str, Any] | Sequence[Any], source: str, **settings: Any
) -> nn.Module:
    """Load another program's checkpoint as a model of cpc_ext that computes the same.

    The kind of model is recognised from the names and shapes of the weights. The model has the precision of the
    weights and is in evaluation mode.

    ================= ==================================================================================
    source            models returned, by what the checkpoint holds
    ================= ==================================================================================
    cpc-audio         :class:`~cpc_ext.models.CPC` on sound
    cpcv2-pytorch     :class:`~cpc_ext.models.CPC`; an encoder (ResNet v2, wide ResNet, MobileNetV2); a
                      :class:`~cpc_ext.models.GatedPixelCNNContext`
    greedy-infomax    :class:`~cpc_ext.models.GreedyInfoMax`, which with one module and a context network
                      is contrastive predictive coding; :class:`~cpc_ext.models.GreedySupervised`; an
                      encoder if the modules have no loss; a context network, or with its loss a CPC
                      whose input are encodings; a :class:`~cpc_ext.nn.GridInfoNCE`
    greedy-infomax-   :class:`~cpc_ext.models.GreedyInfoMax` on sound; for one module
    audio             :class:`~cpc_ext.models.CPC`
    lightly,          :class:`~cpc_ext.models.TimmEncoder` (``pip install 'cpc_ext[timm]'``): the ResNet of their
    solo-learn,       SimCLR and other siamese networks, which maps images [B, C, H, W] to [B, D, 1, 1] by
    sthalles-simclr   ``encoder(images[:, None, None])``
    lightning-bolts   CPC with the program's own encoder or one of timm's; without an encoder a CPC
                      whose input are encodings [B, D, rows, cols]; a
                      :class:`~cpc_ext.models.ResidualContext`
    pixel-cnn-pp      :class:`~cpc_ext.models.PixelCNNPP`
    pytorch-          :class:`~cpc_ext.models.BinaryGatedPixelCNN`, which evaluates and draws binary images
    generative
    ================= ==================================================================================

    Args:
        path_or_state_dict: a PyTorch or safetensors file, the folder of a run on sound, a state dict, a dictionary
            around one such as Lightning's, or a sequence of these if modules were saved separately (Greedy InfoMax:
            first to last). Prefixes of DataParallel, optimizer states, and averaged weights beside the weights are
            ignored.
        source: one of ``SOURCES``.
        settings: properties that the checkpoint does not determine. Options that the file records take precedence over
            the defaults below, as do those that CPCV2-PyTorch writes into the file's name and those that the programs
            for sound leave in the file's folder, in log.txt or checkpoint_args.json. A warning lists the assumed
            defaults that affect the encodings of images.

            - ``grid_size``: number of patches along a side. Default for cpcv2-pytorch: the smallest that the steps fit;
              for an encoder alone 5 with a CIFAR stem and 7 with other stems. Default for greedy-infomax and
              lightning-bolts: 7.
            - ``image_size``: side in pixels of the image that is cut into patches. Default for cpcv2-pytorch: 30 with a
              CIFAR stem, 64 with STL-10's, 256 with ImageNet's, or the next smaller size that the patches fill, or what
              a given ``patch_size`` or ``stride`` needs. Default for greedy-infomax and lightning-bolts: what the grid
              needs. For models without patches the side of the images. Default for pixel-cnn-pp: 32, or 28 for grey
              images; for siamese networks: 32 with a first convolution of 3x3, else 224, or 96 for sthalles-simclr.
            - ``patch_size``, ``stride``: in pixels. Default stride: patches overlap by half. Default patch size: 16 for
              greedy-infomax; for lightning-bolts what the checkpoint records, or 8. With these, models take images as
              well as patches.
            - ``norm``: "layer" or "instance". There is no default: it must be known for encoders with one of the two,
              whose weights look alike.
            - ``skip``: number of rows between a context and its first target. Default: 1.
            - ``neg_samples``: number of negatives for each prediction, or "all". Default: 16; 10 for
              greedy-infomax-audio, 128 for cpc-audio.
            - ``normalization``: how audio samples are normalised (greedy-infomax-audio). "greedy-infomax", the default:
              by the program's constants for its data, so that the model takes samples in ±1 or int16, as all other
              models do. "none": not at all, for samples that are normalised already.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this program; the message says which names
            did not match and which program they resemble. It is a ValueError.
        ValueError: the source is unknown, a setting does not fit the checkpoint or is not used by it, or a norm must be
            given.
        TypeError: the argument is not a path or dictionary, or there is no such setting.
        ImportError: timm is needed and not installed.
    """
    reference = read_reference(path_or_state_dict, source, **settings)
    if reference.assumed and "grid_size" in reference.configuration:
        warnings.warn(f"not told by the checkpoint, and assumed: {'; '.join(reference.assumed)}", stacklevel=2)
    return reference.model


def read_reference(
    path_or_state_dict: str | Path | Mapping[str, Any] | Sequence[Any], source: str, **settings: Any
) -> Reference:
    """Load a checkpoint as :func:`load_reference` does, and return what was recognised and is needed to export it."""
    program = _program(source)
    checkpoint = read_checkpoint(path_or_state_dict)
    idle = [name for name, value in settings.items() if value is not None and name not in program.settings]
    if Settings.__dataclass_fields__.keys() >= settings.keys() and idle:
        raise ValueError(f"{', '.join(idle)}: checkpoints of {source} have no use for it")
    # Read these options once for both the settings and the program, because some programs leave them in another file.
    checkpoint = replace(checkpoint, options={**program.noted_in_name(checkpoint), **checkpoint.options})
    chosen = Settings.of(settings, checkpoint.options)
    try:
        reference = program.load(checkpoint, chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_looks_like(checkpoint, source)}") from None
    reference.model.eval()
    return reference


def export_reference(model: nn.Module, source: str, *, form: Form | None = None) -> dict[str, Tensor]:
    """Return a model's weights by another program's names, for its ``load_state_dict``.

    For Greedy InfoMax this is the state dict of the whole model, unless ``form`` says otherwise. If the program scales
    scores by another factor than the model (``scale``, ``score``), the prediction matrices are rescaled so that the
    scores stay the same.

    Args:
        model: a model of a kind that :func:`load_reference` returns.
        source: one of ``SOURCES``.
        form: the form of the :class:`Reference` that the model came from, to write the same names and the unchanged
            tensors that the model does not use. None for a model of ours: CPCV2-PyTorch's classifier is then missing,
            and weights that a program has but does not use are zero.

    Raises:
        CheckpointError: the program has no such model.
        ValueError: the source is unknown.
    """
    state = _program(source).export(model, form)
    return {name: value.detach() for name, value in state.items()}


def save_reference(model: nn.Module, source: str, path: str | Path, *, form: Form | None = None) -> None:
    """Write a model as a file that another program loads, together with other files that the program needs.

    CPC_audio needs checkpoint_args.json, which holds the options that the model is built from. Existing files are
    replaced atomically.

    Args:
        model, source, form: as for :func:`export_reference`.
        path: the file; its folder must exist.

    Raises:
        CheckpointError, ValueError: as :func:`export_reference` does.
        OSError: a file cannot be written.
    """
    path = Path(path)
    content, beside = _program(source).packed(model, export_reference(model, source, form=form))
    with atomic_file(path) as file:
        write_tensors(file, content)
    for name, text in beside.items():
        write_text(path.parent / name, text)


def _program(source: str) -> Program:
    if source not in _PROGRAMS:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return _PROGRAMS[source]


def _looks_like(checkpoint: Checkpoint, source: str) -> str:
    """Return a message that says what a rejected checkpoint holds and which program's names it resembles."""
    names = [name for part in checkpoint.parts for name in part]
    known = {program.source: sum(map(program.knows, names)) for program in _PROGRAMS.values()}
    best = max(known, key=lambda name: known[name])
    text = f"It holds {len(names)} tensors: {some(names)}."
    if known[best] == 0:
        return f"{text} None of {', '.join(SOURCES)} has such names."
    if best != source and known[best] > known[source]:
        return f"{text} It looks like {best}, which has {known[best]} of these names; {source} has {known[source]}."
    return f"{text} {source} has {known[source]} of these names."
