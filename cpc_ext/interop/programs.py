"""Checkpoints of other programs as models of ours, and models as their checkpoints."""

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
    """The model of ours that computes what another program's checkpoint does, with its weights.

    What it is, is recognised from names and shapes. The model has the precision of the weights, in evaluation mode.

    ================= ==================================================================================
    source            what comes out, by what the checkpoint holds
    ================= ==================================================================================
    cpc-audio         :class:`~cpc_ext.models.CPC` on sound
    cpcv2-pytorch     :class:`~cpc_ext.models.CPC`; an encoder (ResNet v2, wide ResNet, MobileNetV2); a
                      :class:`~cpc_ext.models.GatedPixelCNNContext`
    greedy-infomax    :class:`~cpc_ext.models.GreedyInfoMax`, of one module with a context network CPC;
                      :class:`~cpc_ext.models.GreedySupervised`; an encoder where modules have no loss; a
                      context network; a :class:`~cpc_ext.nn.GridInfoNCE`
    greedy-infomax-   :class:`~cpc_ext.models.GreedyInfoMax` on sound, of one module
    audio             :class:`~cpc_ext.models.CPC`
    lightly,          :class:`~cpc_ext.models.TimmEncoder` (``pip install 'cpc_ext[timm]'``): the ResNet of their
    solo-learn,       SimCLR and other siamese networks, which takes images [B, C, H, W] as
    sthalles-simclr   ``encoder(images[:, None, None])``, [B, D, 1, 1]
    lightning-bolts   CPC with its own encoder or one of timm's; without an encoder a CPC
                      whose input are encodings [B, D, rows, cols]; a
                      :class:`~cpc_ext.models.ResidualContext`
    pixel-cnn-pp      :class:`~cpc_ext.models.PixelCNNPP`
    pytorch-          :class:`~cpc_ext.models.BinaryGatedPixelCNN`, which evaluates and draws binary images
    generative
    ================= ==================================================================================

    Args:
        path_or_state_dict: a file of PyTorch or safetensors, the folder of a run on sound, a state dict, a dictionary
            around one such as Lightning's, or a sequence of these where modules were saved separately (Greedy InfoMax:
            first to last). Prefixes of DataParallel, optimizer states and averaged weights beside the weights do not
            matter.
        source: one of ``SOURCES``.
        settings: what the checkpoint does not tell, where the defaults do not fit:

            - ``grid_size``: patches along a side. Default: the smallest that the steps fit, else 5 behind a stem for
              CIFAR and 7 behind others (cpcv2-pytorch); 7 (greedy-infomax, lightning-bolts).
            - ``image_size``: side in pixels of what is cut into patches: 30 behind a stem for CIFAR, 64 behind
              STL-10's, 256 behind ImageNet's, or the next size below that the patches fill, another one where a given
              ``patch_size`` or ``stride`` needs it (cpcv2-pytorch); what the grid needs (greedy-infomax,
              lightning-bolts). Of pixel-cnn-pp that of images, 32, or 28 of grey ones;
              so of siamese networks, 32 behind a first convolution of 3x3, else 224, or 96 (sthalles-simclr).
            - ``patch_size``, ``stride``: in pixels. Default: neighbours overlap by half; 16 (greedy-infomax), what the
              checkpoint notes or 8 (lightning-bolts). With them models take images, too; patches they always take.
            - ``norm``: "layer" or "instance", whose weights look alike. No default: one of the two must be known.
            - ``skip``: rows between a context and its first target. Default: 1.
            - ``neg_samples``: negatives of each prediction, or "all". Default: 16; 10 (greedy-infomax-audio), 128
              (cpc-audio).
            - ``normalization``: what samples are normalised by: "greedy-infomax", the constants that the program has
              for its data, so that the model takes samples in ±1 or int16 as all others do; or "none", for samples that
              are already (greedy-infomax-audio). Default: "greedy-infomax".

            What a file notes of the options that its program was run with counts before these defaults, and so do what
            CPCV2-PyTorch writes into a file's name and what the programs of sound leave in its folder, log.txt and
            checkpoint_args.json. A warning tells which defaults were taken that decide what
            images are encoded as.

    Raises:
        CheckpointError: a ValueError; the file is missing or damaged, or not a checkpoint of this program; the message
            says what it looks like and which names did not fit.
        ValueError: a source that is not known, a setting that does not fit the checkpoint or is of no use for it, or a
            norm that has to be given.
        TypeError: no path or dictionary, or a setting that does not exist.
        ImportError: timm is needed and not installed.
    """
    reference = read_reference(path_or_state_dict, source, **settings)
    if reference.assumed and "grid_size" in reference.configuration:
        warnings.warn(f"not told by the checkpoint, and assumed: {'; '.join(reference.assumed)}", stacklevel=2)
    return reference.model


def read_reference(
    path_or_state_dict: str | Path | Mapping[str, Any] | Sequence[Any], source: str, **settings: Any
) -> Reference:
    """:func:`load_reference` with what was recognised, and what is needed to write the checkpoint again as it was."""
    program = _program(source)
    checkpoint = read_checkpoint(path_or_state_dict)
    idle = [name for name, value in settings.items() if value is not None and name not in program.settings]
    if Settings.__dataclass_fields__.keys() >= settings.keys() and idle:
        raise ValueError(f"{', '.join(idle)}: checkpoints of {source} have no use for it")
    # These are looked for once, for the settings and for the program, as some programs leave them in a file beside.
    checkpoint = replace(checkpoint, options={**program.noted_in_name(checkpoint), **checkpoint.options})
    chosen = Settings.of(settings, checkpoint.options)
    try:
        reference = program.load(checkpoint, chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_looks_like(checkpoint, source)}") from None
    reference.model.eval()
    return reference


def export_reference(model: nn.Module, source: str, *, form: Form | None = None) -> dict[str, Tensor]:
    """A model's weights by another program's names: what its ``load_state_dict`` takes.

    Of Greedy InfoMax that is the state dict of its whole model, unless the form says otherwise. Where a program scores
    predictions by another factor than the model does (``scale``, ``score``), its prediction matrices are so much larger
    or smaller that scores stay the same.

    Args:
        model: as :func:`load_reference` returns them.
        source: one of ``SOURCES``.
        form: of the :class:`Reference` that the model came from, to get the same names, and the tensors for which the
            model has no use, as they were. None for a model of ours: CPCV2-PyTorch's classifier is then missing, and
            what a program keeps without using it is zero.

    Raises:
        CheckpointError: the program has no such model.
        ValueError: a source that is not known.
    """
    state = _program(source).export(model, form)
    return {name: value.detach() for name, value in state.items()}


def save_reference(model: nn.Module, source: str, path: str | Path, *, form: Form | None = None) -> None:
    """Write a model as a file that another program loads, and beside it what the program wants to find there.

    CPC_audio wants checkpoint_args.json, which says what the model is built from. Files of these names are replaced,
    each when the new one is complete.

    Args:
        model, source, form: as :func:`export_reference` takes them.
        path: of the file, in a folder that exists.

    Raises:
        CheckpointError, ValueError: as of :func:`export_reference`.
        OSError: the file cannot be written.
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
    """What an unfit checkpoint holds, and whose it may be."""
    names = [name for part in checkpoint.parts for name in part]
    known = {program.source: sum(map(program.knows, names)) for program in _PROGRAMS.values()}
    best = max(known, key=lambda name: known[name])
    text = f"It holds {len(names)} tensors: {some(names)}."
    if known[best] == 0:
        return f"{text} None of {', '.join(SOURCES)} has such names."
    if best != source and known[best] > known[source]:
        return f"{text} It looks like {best}, which has {known[best]} of these names; {source} has {known[source]}."
    return f"{text} {source} has {known[source]} of these names."
