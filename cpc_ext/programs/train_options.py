"""The command line of `python -m cpc_ext.train`, which is parsed into a run's config.

Parsing takes two passes. The first reads only the options that choose the defaults, such as the model, the data set,
the recipe and the device, or an earlier run. The second parses all options with these defaults, so that the help shows
the values that the run would have, and every option given replaces one of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import tyro
from pydantic import ValidationError

from cpc_ext.data_sets import DATASETS, medium, origin
from cpc_ext.programs.command_line import parse_command, with_home
from cpc_ext.training.config import (
    LENGTHS,
    RATES,
    OptionError,
    RunConfig,
    explain,
    load_config,
    option,
    options_of_other_models,
)
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import FEW_MINUTES, default_dataset, preset
from cpc_ext.training.registry import MODELS, model_medium, model_recipes
from cpc_ext.training.run_dir import RunDir

__all__ = ["PROGRAM", "Command", "defaults_of", "describe", "parse"]

PROGRAM = "python -m cpc_ext.train"
_DESCRIPTION = (
    "Train a model of images or of speech without labels: by default an encoder by contrastive predictive coding, "
    "evaluated with a linear probe; or a PixelCNN, evaluated in bits per dimension. Without further options it trains "
    "on generated textures, or voices, in minutes on two CPU cores. Options and defaults shown are those of the model "
    "chosen by --model, the data set chosen by --dataset and, for models with several recipes, the --recipe, on this "
    "machine."
)


# The options that the defaults of the others depend on.
_CHOOSING = (
    "--model",
    "--dataset",
    "--recipe",
    "--device",
    "--config",
    "--resume-from",
    "--out-dir",
    "--data-dir",
    "--image-size",
    "--optimizer",
    *map(option, LENGTHS),
)


@dataclass(frozen=True)
class Command:
    """A run to start or to resume.

    run: the run's config. The help texts describe the other options.
    """

    # The empty name makes the help name its groups after the sections alone.
    run: Annotated[RunConfig, tyro.conf.arg(name="", help="")]
    out_dir: Annotated[
        Path | None,
        tyro.conf.arg(help="Folder of the run's files. None: the first free runs/MODEL-DATASET-NUMBER."),
    ] = None
    resume: Annotated[
        bool,
        tyro.conf.arg(
            help="Continue the run in --out-dir from its last checkpoint, with its own options. Only options of "
            "length, logging, evaluation, device, compilation, the pipeline of modules and the location of the data "
            "may change; a longer run follows the schedule of its new length."
        ),
    ] = False
    config: Annotated[
        Path | None,
        tyro.conf.arg(help="The config.yaml of a run to repeat, which sets the defaults of all options."),
    ] = None
    # The field names of the options that were given, and whether all others come from a preset. A preset's values may
    # be adapted to the data; an earlier run's are not.
    given: Annotated[frozenset[str], tyro.conf.Fixed, tyro.conf.Suppress] = frozenset()
    of_preset: Annotated[bool, tyro.conf.Fixed, tyro.conf.Suppress] = False


def parse(arguments: Sequence[str], *, prog: str = PROGRAM) -> Command:
    """Parse command line arguments into a command; messages call the program ``prog``.

    Raises TrainingError if a config file is missing or wrong, and SystemExit with status 2 for wrong options, after
    printing what is allowed, or with status 0 after showing the help or the version.
    """
    arguments = with_home(arguments)
    chosen = _first_pass(arguments)
    try:
        defaults = defaults_of(**vars(chosen))
    except OptionError as error:
        _refuse(str(error), prog)
    arguments = _joined(_with_values(arguments), "--logger")
    _refuse_options_of_other_models(arguments, defaults, prog)
    try:
        command = parse_command(
            Command,
            arguments,
            prog=prog,
            description=_DESCRIPTION,
            default=Command(run=defaults),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except OptionError as error:
        # The parser reports errors within a section; errors between sections arrive here.
        _refuse(str(error), prog)
    _refuse_idle_options(arguments, command.run, prog)
    named = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    earlier = chosen.resume or chosen.config is not None or chosen.resume_from is not None
    return replace(command, given=frozenset(name[2:].replace("-", "_") for name in named), of_preset=not earlier)


def defaults_of(
    *,
    model: str | None = None,
    dataset: str | None = None,
    recipe: str | None = None,
    device: str | None = None,
    config: str | Path | None = None,
    resume_from: str | Path | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    data_dir: str | Path | None = None,
    image_size: str | int | None = None,
    optimizer: str | None = None,
    epochs: object = None,
    steps: object = None,
    time_budget: object = None,
    side: int | None = None,
) -> RunConfig:
    """Return the default config, whose values the given options replace.

    It is that of an earlier run (``resume``, ``config`` or ``resume_from``), or the model's preset for the data set. If
    exactly one length (``epochs``, ``steps`` or ``time_budget``) is given, the config has no length. Unknown names and
    values of the wrong type are not refused here, but when the options are filled in.

    Args:
        side: side of the images in pixels, if they are handed over and not in files.

    Raises:
        TrainingError: an earlier run is missing or does not fit.
        OptionError: the model does not learn from data of this medium.
    """
    if resume and config is not None:
        raise TrainingError("--resume takes the run's own config.yaml: give either --resume or --config")
    if resume and resume_from is not None:
        raise TrainingError(
            "--resume goes on with a run, --resume-from starts a new one from another's weights: give either"
        )
    if resume:
        if out_dir is None:
            raise TrainingError("--resume needs --out-dir, the folder of the run to go on with")
        run = RunDir(Path(out_dir))
        run.check_resumable()
        defaults = load_config(run.config)
    elif config is not None:
        defaults = load_config(Path(config))
    elif resume_from is not None:
        defaults = load_config(RunDir(Path(resume_from)).config, option_name="--resume-from")
        if model not in (None, defaults.model):
            raise TrainingError(f"--resume-from: {resume_from} is a run of {defaults.model}, not of --model {model}")
    else:
        known = model if model in MODELS else RunConfig.model_fields["model"].default
        data = dataset if dataset in DATASETS else default_dataset(known)
        if medium(data) != model_medium(known):
            fitting = ", ".join(name for name in DATASETS if medium(name) == model_medium(known))
            others = " or ".join(name for name in MODELS if model_medium(name) == medium(data))
            raise OptionError(
                f"--dataset {data} has no {model_medium(known)}, it is for {others}; --model {known} takes {fitting}"
            )
        chosen = recipe if recipe in model_recipes(known) else None
        side, minutes = _side(data, data_dir, image_size, side), _minutes(data, data_dir)
        try:
            defaults = preset(known, data, recipe=chosen, device=device, side=side, minutes=minutes)
        except ValidationError as error:
            raise OptionError(explain(error)) from None
    _check_recipe(recipe, defaults)
    if optimizer in RATES and optimizer != defaults.optimization.optimizer and not resume:
        # A learning rate for one optimizer does not suit another.
        optimization = defaults.optimization.model_copy(update={"lr": RATES[optimizer]})
        defaults = defaults.model_copy(update={"optimization": optimization})
    if [epochs, steps, time_budget].count(None) == len(LENGTHS) - 1:
        # The length that is given replaces whichever the defaults have.
        optimization = defaults.optimization.model_copy(update=dict.fromkeys(LENGTHS))
        defaults = defaults.model_copy(update={"optimization": optimization})
    return defaults


def _side(dataset: str, data_dir: str | Path | None, image_size: str | int | None, known: int | None) -> int | None:
    """Return the side in pixels that the user's own images will have, or None if it is unknown.

    known: their side if they are handed over and not in files.
    """
    if medium(dataset) != "images" or origin(dataset).folder not in ("folders", "arrays"):
        return None
    if image_size is not None and str(image_size).isdecimal():
        return int(image_size)
    if data_dir is None:
        return known
    from cpc_ext.data.images.typical_side import typical_side

    return typical_side(Path(data_dir))


def _minutes(dataset: str, data_dir: str | Path | None) -> float | None:
    """Return the total minutes of the user's own recordings, or None if they are unknown."""
    if medium(dataset) != "audio" or origin(dataset).folder != "folders" or data_dir is None:
        return None
    from cpc_ext.data.audio.total_minutes import total_minutes

    return total_minutes(Path(data_dir), enough=FEW_MINUTES)


def _check_recipe(recipe: str | None, defaults: RunConfig) -> None:
    """Raise TrainingError if another recipe is asked for than that of the earlier run that gives the options."""
    theirs = next((section.recipe for _, section in defaults if hasattr(section, "recipe")), None)
    if recipe in model_recipes(defaults.model) and recipe != theirs:
        raise TrainingError(
            f"--recipe {recipe} chooses the defaults of a new run, but the options given are those of one of {theirs}"
        )


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Replace --gather-negatives without a value by --gather-negatives=gather."""
    given = list(arguments)
    for index, argument in enumerate(given):
        alone = index + 1 == len(given) or given[index + 1].startswith("--")
        if argument.replace("_", "-") == "--gather-negatives" and alone:
            given[index] = f"{argument}=gather"
    return given


def _joined(arguments: Sequence[str], name: str) -> list[str]:
    """Collect the values of a repeated option at its first place, because the parser would keep only the last."""
    rest, values, place = [], [], None
    taking = False
    for argument in arguments:
        found, _, value = argument.partition("=")
        if argument.startswith("--"):
            taking = found == name
        if not taking:
            rest.append(argument)
        elif argument.startswith("--"):
            place = len(rest) if place is None else place
            values += [value] if value else []
        else:
            values.append(argument)
    return rest if place is None else [*rest[:place], name, *values, *rest[place:]]


def _refuse_options_of_other_models(arguments: Sequence[str], defaults: RunConfig, prog: str) -> None:
    others = options_of_other_models(type(defaults))
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        name = name if name in others else name.removeprefix("no_")
        if argument.startswith("--") and name in others:
            models = ", ".join(others[name])
            _refuse(f"{option(name)} is an option of --model {models}; {defaults.model} has no such option", prog)


def _refuse_idle_options(arguments: Sequence[str], run: RunConfig, prog: str) -> None:
    idle = run.idle()
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        name = name if name in idle else name.removeprefix("no_")
        if argument.startswith("--") and name in idle:
            _refuse(f"{option(name)} would have no effect: {idle[name]}", prog)


def _refuse(message: str, prog: str) -> NoReturn:
    print(f"error: {message}\nFor full helptext, see {prog} --help", file=sys.stderr)
    raise SystemExit(2) from None


def _first_pass(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # The second pass reports missing values.
    for name in _CHOOSING:
        parser.add_argument(name, nargs="?")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_known_args([_spelled(argument) for argument in arguments])[0]


def _spelled(argument: str) -> str:
    """Return an argument with the option's name spelled with dashes: the second pass accepts --out_dir too."""
    name, given, value = argument.partition("=")
    return f"{option(name[2:])}{given}{value}" if name.startswith("--") else argument


def describe(config: RunConfig) -> str:
    """Return the config as the options that produce it, one line per section, without those that have no effect."""
    idle = config.idle()
    lines = [f"  {'model':<14}--model {config.model}"]
    for section, values in config:
        if section != "model":
            options = (_as_option(name, value) for name, value in values if value is not None and name not in idle)
            if told := " ".join(options):
                lines.append(f"  {section:<14}{told}")
    return "\n".join(lines)


def _as_option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return option(name) if value else option(f"no_{name}")
    if isinstance(value, tuple):
        return " ".join([option(name), *map(str, value)])
    return f"{option(name)} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
