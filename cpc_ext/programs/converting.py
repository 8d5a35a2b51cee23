"""The work of `python -m cpc_ext.convert`: turn another program's checkpoint into a run's folder, or a run into one.

The run is as after zero steps of training: a config that describes the model, and a checkpoint with its weights. The
checkpoint also keeps what else the other program's had, so that converting back gives the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cpc_ext.data_sets import folder_of, origin
from cpc_ext.evaluation.empty_task import empty_task, put_into, saved_run
from cpc_ext.interop import CheckpointError, Form, Reference, export_reference, read_reference, save_reference
from cpc_ext.models.greedy_infomax import module_starts
from cpc_ext.programs.convert import Command
from cpc_ext.programs.converting_sound import sound_options
from cpc_ext.programs.train_options import describe
from cpc_ext.tasks.encoder_names import encoder_name
from cpc_ext.training.atomic_file import atomic_file, write_text
from cpc_ext.training.checkpoint import save_checkpoint, write_tensors
from cpc_ext.training.config import RunConfig, explain, option, validate_config
from cpc_ext.training.errors import TrainingError, writing
from cpc_ext.training.presets import preset
from cpc_ext.training.registry import model_medium
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.safetensors_file import write_safetensors

__all__ = ["convert"]

# The run's data set if none is named: by the size of the patches, or by that of the images.
_BY_PATCH = {8: "cifar10", 10: "cifar10", 16: "stl10"}
_BY_IMAGE = {32: "cifar10", 96: "stl10"}
# Entry of our checkpoint for what it keeps of the other program's besides the model.
_KEPT = "reference"
# Kinds of checkpoints with an encoder alone, and which parts of the model start from random weights.
_ENCODERS = {"encoder": "context network and predictions start", "image-encoder": "the projection head starts"}


def convert(command: Command) -> None:
    """Convert as the command says. Raises TrainingError if that is not possible."""
    try:
        if command.source is not None:
            _take_over(command, command.source)
        else:
            _hand_over(command, str(command.to))
    except (CheckpointError, ImportError) as error:
        # ImportError: encoders from timm need timm.
        raise TrainingError(str(error)) from None


def _take_over(command: Command, source: str) -> None:
    """Convert a checkpoint into a new run."""
    given = {name: getattr(command, name) for name in ("grid_size", "image_size", "patch_size", "norm")}
    try:
        reference = read_reference(list(command.checkpoint), source, **given)
    except CheckpointError:
        raise
    except ValueError as error:
        raise TrainingError(str(error)) from None
    config = _config(reference, command.dataset, command.data_dir)
    task = empty_task(config, reference.configuration.get("image_shape"), reference.configuration.get("classes", 0))
    # The submodule of the run's model that the checkpoint holds: the whole model ("") or its encoder.
    part = "encoder" if reference.configuration["kind"] in _ENCODERS else ""
    put_into(task.model, reference.model.state_dict(), part)
    state = {
        "step": 0,
        "config": config.model_dump(mode="json"),
        # There is no data set whose statistics a description could hold; only pixel models are rebuilt from theirs.
        "description": task.description() if config.model == "pixelcnn++" else {},
        "model": task.model.state_dict(),
        _KEPT: {"source": source, "part": part, "layout": reference.form.layout, "unused": reference.form.unused},
    }
    run = RunDir.create(command.out, model=config.model, dataset=config.data.dataset, option_name="--out")
    try:
        with writing(command.out, "--out"):
            write_text(run.config, config.to_yaml())
            save_checkpoint(run.checkpoint, state)
    finally:
        run.release()
    parameters = sum(parameter.numel() for parameter in reference.model.parameters())
    print(f"{type(reference.model).__name__} of {source}, {parameters:,} parameters, is a run in {command.out}")
    print(describe(config))
    if part:
        print(f"the checkpoint holds an encoder alone: {_ENCODERS[reference.configuration['kind']]} from the seed")
    assumed = list(reference.assumed)
    # Pixel models use unnormalised values, so the data set's statistics do not matter.
    by_statistics = model_medium(config.model) == "images" and config.model != "pixelcnn++"
    if command.dataset is None and "dataset" not in reference.configuration and by_statistics:
        assumed.append(f"--dataset {config.data.dataset}, whose mean and deviation images are normalised by")
    if assumed:
        print(f"not told by the checkpoint, and assumed: {'; '.join(assumed)}")


def _config(reference: Reference, dataset: str | None, data_dir: Path | None) -> RunConfig:
    """Return the config of a run with the reference's model. Raises TrainingError if no config describes it."""
    found = reference.configuration
    kind = found["kind"]
    if kind == reference.source:
        model, changes = sound_options(reference.model)
        return _changed(model, dataset or folder_of("audio"), {**changes, "data": {"data_dir": data_dir}})
    if kind == "binary-pixels":
        raise TrainingError(
            f"no run is made of a {type(reference.model).__name__}; cpc_ext.interop.load_reference loads it"
        )
    if kind == "part":
        raise TrainingError(
            f"the checkpoint holds a {type(reference.model).__name__} without an encoder, of which no run can be made; "
            "cpc_ext.interop.load_reference loads it"
        )
    model = {"cpc": "cpc-v1", "encoder": "cpc-v1", "greedy": "greedy-infomax", "image-encoder": "simclr"}.get(
        kind, kind
    )
    dataset = dataset or found.get("dataset")
    # Models without an image shape take patches.
    size = found["image_shape"][1] if "image_shape" in found else None
    if dataset is None:
        dataset = _BY_PATCH.get(found["patch_size"], "folder") if size is None else _BY_IMAGE.get(size, "folder")
    whole_images = {"pixelcnn++": _pixelcnn_options, "image-encoder": _image_encoder_options}
    changes = whole_images.get(kind, _patch_model_options)(found)
    changes["data"] = {"data_dir": data_dir}
    if size is not None and origin(dataset).sized:
        changes["data"]["image_size"] = size
    return _changed(model, dataset, changes)


def _changed(model: str, dataset: str, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Return a model's preset for a data set with some options changed. Raises TrainingError for wrong ones."""
    tree = preset(model, dataset).model_dump()
    for section, values in changes.items():
        tree[section] = {**tree[section], **values}
    try:
        return validate_config(tree)
    except ValidationError as error:
        raise TrainingError(explain(error)) from None


def _patch_model_options(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the config sections of a model that takes patches."""
    arguments = found["encoder"]["arguments"]
    grid, patch, crop = found["grid_size"], found["patch_size"], found["image_size"]
    halves = 2 * crop == patch * (grid + 1)
    view = {
        "crop": crop,
        "pad": found.get("pad", 0),
        "grid_size": grid,
        "patch_size": None if halves else patch,
        "gray": arguments["in_channels"] == 1,
        "patch_norm": False,
    }
    if "patch_augmentation" in found:
        view["patch_augmentation"] = found["patch_augmentation"]
    names = ("context_layers", "context_channels", "target_channels", "pred_steps", "pred_directions", "skip")
    cpc = {name: found[name] for name in (*names, "neg_samples") if name in found}
    cpc["encoder"] = encoder_name(found["encoder"]["class"], arguments)
    if "norm" in arguments:
        cpc["norm"] = arguments["norm"]
    options = {"view": view, "cpc": cpc}
    skip = cpc.setdefault("skip", 1)
    if found["kind"] == "cpc-v2":
        # The checkpoint's one context network is for its only direction.
        cpc |= {"variant": "lightning-bolts", "shared_context": True, "pred_directions": 1}
        cpc["prediction_scale"] = found["scale"]
        cpc["pred_steps"] = grid - 1 - skip
    else:
        cpc.setdefault("pred_steps", max(1, grid - 1 - skip))
        cpc.setdefault("pred_directions", 1)
    if found["kind"] == "greedy":
        starts = found["module_starts"]
        options["greedy"] = {
            "modules": len(starts),
            "split_at": None if _is_even(starts, arguments["blocks"]) else tuple(starts[1:]),
            "objective": found["objective"],
        }
    return options


def _is_even(starts: Sequence[int], blocks: Sequence[int]) -> bool:
    """Return whether the number of modules alone gives modules that start at these blocks."""
    return len(starts) <= len(blocks) and list(starts) == module_starts(blocks, len(starts))


def _pixelcnn_options(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    arguments = found["arguments"]
    return {
        "pixelcnn": {
            "layers": arguments["blocks"],
            "hidden_channels": arguments["channels"],
            "mixtures": arguments["mixtures"],
            "dropout": 0.5,
            "data_init": False,
        }
    }


def _image_encoder_options(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    encoder = encoder_name(found["encoder"]["class"], found["encoder"]["arguments"])
    return {"simclr": {"encoder": encoder, "view_size": found["image_shape"][1], "center_scale": 1.0}}


def _hand_over(command: Command, target: str) -> None:
    """Write a run's model as a checkpoint of another program."""
    if len(command.checkpoint) != 1:
        raise TrainingError(f"--to takes one run, got {len(command.checkpoint)}")
    given = [
        name
        for name in ("dataset", "data_dir", "grid_size", "image_size", "patch_size", "norm")
        if getattr(command, name) is not None
    ]
    if given:
        raise TrainingError(f"{', '.join(map(option, given))}: the run of --to has its own")
    checkpoint = RunDir(command.checkpoint[0]).checkpoint
    config, state, task, *_ = saved_run(command.checkpoint[0])
    kept = state.get(_KEPT, {})
    model, form = task.model, None
    if kept.get("source") == target:
        # The run has not been trained since it was converted, so the original layout is restored.
        try:
            model, form = model.get_submodule(kept["part"]), Form(kept["layout"], kept["unused"])
        except (AttributeError, LookupError, TypeError) as error:
            raise TrainingError(f"{checkpoint} does not tell what of {target} it came from ({error})") from None
    exported = export_reference(model, target, form=form)
    if model_medium(config.model) == "audio" and command.out.suffix != ".safetensors":
        # The program reads the model's options from a file beside the checkpoint.
        with writing(command.out, "--out"):
            save_reference(model, target, command.out, form=form)
        print(f"{len(exported)} tensors of {target} are in {command.out}")
        return
    files = {command.out: exported}
    if form is not None and form.layout == "files":
        files = _by_module(command.out, exported)
    for path, tensors in files.items():
        _write(path, tensors)
        print(f"{len(tensors)} tensors of {target} are in {path}")


def _by_module(path: Path, state: Mapping[str, Tensor]) -> dict[Path, dict[str, Tensor]]:
    """Split a state that was in one file per module into files PATH_0, PATH_1 ...; a single module keeps PATH."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        if not (module.isdecimal() or module == "autoregressor"):
            return {path: dict(state)}
        parts.setdefault(module, {})[rest] = value
    return {path.with_name(f"{path.stem}_{module}{path.suffix}"): part for module, part in parts.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Clone: a tensor may have two names, and is then stored twice.
    own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    with writing(path, "--out"), atomic_file(path) as file:
        if path.suffix == ".safetensors":
            write_safetensors(file, own, {"format": "pt"})
        else:
            write_tensors(file, own)
