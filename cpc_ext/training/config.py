"""Everything that determines a run, as one typed tree that the command line and config.yaml both fill.

Each section is a group of options. A field defines the option of the same name: its description is the help text, and
its bounds are checked. This module has the sections that all runs share, with their general defaults. A model's own
sections, and the defaults that depend on the data set, are beside its task.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from cpc_ext.data_sets import DATASETS, idle_of_dataset, medium, origin
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import check_device_name
from cpc_ext.training.registry import MODELS, config_class, model_medium, published, title

__all__ = [
    "LENGTHS",
    "LOGGERS",
    "MAY_CHANGE",
    "MOST",
    "RATES",
    "DataSection",
    "DatasetName",
    "DeviceSection",
    "OptimizationSection",
    "OptionError",
    "OutputSection",
    "Preset",
    "Presets",
    "RunConfig",
    "Section",
    "explain",
    "load_config",
    "option",
    "options_of_other_models",
    "options_that_may_change",
    "validate_config",
]

if TYPE_CHECKING:
    Model = str
    DatasetName = str
else:
    Model = Literal[MODELS]
    DatasetName = Literal[DATASETS]
Logger = Literal["tensorboard", "wandb", "mlflow"]
LOGGERS: tuple[str, ...] = get_args(Logger)
Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "constant"]
Optimizer = Literal["adam", "sgd", "lars"]
# Data sets of the user's own files, and those of them with one file per image or recording.
_OF_FILES = [name for name in DATASETS if origin(name).folder in ("folders", "arrays")]
_OF_FOLDERS = [name for name in _OF_FILES if name.endswith("folder")]
# Default learning rate of an optimizer that replaces the preset's: Adam's is from CPCV2-PyTorch, SGD's from MoCo.
# LARS takes steps of a thousandth of the weights' norm at a rate of 1; docs/training.md has a measurement of its rate.
RATES = {"adam": 2e-4, "sgd": 0.03, "lars": 0.5}
# The options that set the length of a run; exactly one of them is given.
LENGTHS = ("epochs", "steps", "time_budget")
# A preset holds the values that differ from the defaults of a model's config, by section; presets are by data set.
Preset = Mapping[str, Mapping[str, Any]]
Presets = Mapping[str, Preset]

# Largest image side or number of channels that an option accepts.
MOST = 2**16
# Error messages quote at most this many characters of a wrong value.
_SHOWN = 200


class _MayChange:
    """Marks an option that may change when a run is resumed, because it does not affect the steps taken so far."""


MAY_CHANGE = _MayChange()


class OptionError(ValueError):
    """Raised for options that are invalid or contradict each other; the message names each on a line of its own."""


class Section(BaseModel):
    """A group of options; its docstring describes it in the help."""

    # Validators are built on first use: a program needs only the sections of one model.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), defer_build=True
    )

    def __init__(self, **values: Any) -> None:
        # The command line prints the error's message, which should name options and not pydantic's internals.
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionError(explain(error)) from None


def option(name: str) -> str:
    """Return the command-line spelling of a field: "batch_size" → "--batch-size"."""
    return "--" + name.replace("_", "-")


def explain(error: ValidationError) -> str:
    """Return a validation error as text, one line per option: its name, what is allowed, and what was given."""
    lines = []
    known = set(RunConfig.model_fields).union(*(_fields_of(config_class(model)) for model in MODELS))
    for entry in error.errors():
        # Field names are unique over all sections, so the innermost one is the option. Union branches come after it.
        names = [str(part) for part in entry["loc"] if str(part).isidentifier()]
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "value_error":
            lines.append(message)
        elif entry["type"] == "extra_forbidden":
            place = ".".join(map(str, entry["loc"]))
            lines.append(f"{place}: there is no such option")
        else:
            field = next((name for name in reversed(names) if name in known), names[-1] if names else "config")
            came = repr(entry["input"])
            came = came if len(came) <= _SHOWN else f"{came[:_SHOWN]}..."
            lines.append(f"{option(field)}: {message[0].lower()}{message[1:]}, got {came}")
    return "\n".join(dict.fromkeys(lines))


class DataSection(Section):
    """The images or recordings to learn from."""

    dataset: DatasetName = Field(
        "textures",
        description="Data set to train on. It also determines the defaults of most other options; --dataset NAME "
        "--help shows them. textures and voices are generated in seconds and need no files; folder is any tree of "
        "images.",
    )
    data_dir: Annotated[Path | None, MAY_CHANGE] = Field(
        None,
        description="Folder of the data set's files, or of your own files if --dataset is a kind of files: "
        f"{', '.join(_OF_FILES)} (all but {' and '.join(_OF_FOLDERS)} also take a single file). None: the user's "
        "cache.",
    )
    download: Annotated[bool, MAY_CHANGE] = Field(
        False, description="Download the data set's published files if they are missing."
    )
    image_size: Annotated[int, Field(ge=16, le=MOST)] | None = Field(
        None,
        description="Side in pixels of generated images, or the side that images of a folder are resized to. None: "
        "the data set's own size.",
    )
    utterances: Annotated[int, Field(ge=1, le=MOST)] | None = Field(
        None,
        description="Number of utterances of each of the sixteen generated voices to train on; ten per voice last "
        "about ten minutes in total. Probes always learn from the first 11 utterances of each voice. None: train on "
        "these 11.",
    )


class OptimizationSection(Section):
    """Initial weights, length of the run, optimizer and learning rate."""

    resume_from: Path | None = Field(
        None,
        description="Folder of a run to start from: the new run starts with the weights of its model, and its options "
        "are the defaults of all others. None: initial weights drawn from --seed.",
    )
    epochs: Annotated[Annotated[int, Field(ge=1)] | None, MAY_CHANGE] = Field(
        None, description="Length of the run in passes over the data (excludes --steps and --time-budget)."
    )
    steps: Annotated[Annotated[int, Field(ge=1)] | None, MAY_CHANGE] = Field(
        None, description="Length of the run in parameter updates (excludes --epochs and --time-budget)."
    )
    time_budget: Annotated[Annotated[float, Field(gt=0, le=1e6)] | None, MAY_CHANGE] = Field(
        None,
        description="Length of the run in minutes of training (excludes --epochs and --steps). The run first times "
        "some steps, then sets --steps and --checkpoint-every accordingly, and, if they are not given, adapts "
        "--log-every and limits --warmup-steps. Loading the data and evaluating the trained model take additional "
        "time.",
    )
    batch_size: int = Field(16, ge=1, description="Number of images, or of windows of recordings, per update.")
    optimizer: Optimizer = Field(
        "adam",
        description="Optimizer. adam: Adam, or AdamW with --weight-decay above 0; sgd: SGD with --momentum; lars: LARS "
        "with --momentum, which scales each layer's step by the norm of its weights, for large batches, as in the "
        "SimCLR paper. An optimizer other than the default also changes the default of --lr: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
        + ".",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd and lars.")
    lr: float = Field(RATES["adam"], gt=0, le=1000, allow_inf_nan=False, description="Peak learning rate.")
    schedule: Schedule = Field(
        "constant", description="Learning rate after the warm-up: constant, or a half cosine to --final-lr at the end."
    )
    final_lr: float = Field(
        0.0, ge=0, le=1, description="Learning rate at the end of --schedule cosine, as a fraction of --lr."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Number of updates over which the learning rate rises linearly from zero."
    )
    clip_grad: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Maximum norm of the gradient of all parameters together. None: no clipping."
    )

    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight decay: AdamW multiplies weights by 1 - learning rate * weight decay in each update; sgd "
        "and lars add weight decay * weight to the gradient.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> OptimizationSection:
        given = [option(name) for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of {', '.join(map(option, LENGTHS))}" + (f", not {' and '.join(given)}" if given else "")
            )
        return self


class DeviceSection(Section):
    """Device, precision, memory format and seed."""

    device: Annotated[str, MAY_CHANGE] = Field(
        "cpu", description="Device to train on: cpu, cuda, cuda:1, mps. The default is an accelerator if there is one."
    )
    precision: Precision = Field(
        "fp32",
        description="Number format of convolutions and matrix products; parameters stay fp32. The default is bf16 if "
        "the device has native instructions for it. fp16 is for GPUs without bf16, and slow on a CPU.",
    )
    channels_last: bool = Field(True, description="Use the channels-last memory format, which is nearly always faster.")
    compile: Annotated[bool, MAY_CHANGE] = Field(
        False, description="Compile the model with torch.compile: this takes minutes at the start and speeds up steps."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initial weights, order of the data, crops and negatives.")

    @model_validator(mode="after")
    def _device_exists(self) -> DeviceSection:
        check_device_name(self.device)
        return self


class OutputSection(Section):
    """Logs, checkpoints and the evaluation at the end."""

    log_every: Annotated[int, MAY_CHANGE] = Field(
        20, ge=1, description="Number of updates per line of metrics.jsonl, which contains the means over them."
    )
    checkpoint_every: Annotated[int, MAY_CHANGE] = Field(
        500, ge=1, description="Number of updates between checkpoints. A checkpoint is always written at the end."
    )
    evaluate: Annotated[bool, MAY_CHANGE] = Field(
        True,
        description="Evaluate the model after the last step, which may take a minute or two. With --no-evaluate the "
        "run only writes its files and figures.",
    )
    logger: Annotated[tuple[Logger, ...], MAY_CHANGE] = Field(
        ("tensorboard",),
        description="Loggers that receive metrics, config and figures, in addition to metrics.jsonl and metrics.csv; "
        "any number of them, or none. wandb and mlflow need the extras cpc_ext[wandb] and cpc_ext[mlflow], and write "
        "into the run's folder.",
    )

    @field_validator("logger", mode="before")
    @classmethod
    def _one_logger(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @field_validator("logger")
    @classmethod
    def _each_logger_once(cls, names: tuple[Logger, ...]) -> tuple[Logger, ...]:
        return tuple(dict.fromkeys(names))


class RunConfig(Section):
    """The options of a run; on the CPU, equal configs on one machine and number of threads give equal metrics.

    This class has what all models share; :func:`config_class` returns the class with a model's own sections.
    """

    model: Model = Field(
        "cpc-v1",
        description="Model to train; it determines which options exist. "
        + " ".join(f"{model}: {published(model)}" for model in MODELS),
    )
    data: DataSection = Field(default_factory=DataSection)
    optimization: OptimizationSection
    compute: DeviceSection = Field(default_factory=DeviceSection)
    output: OutputSection = Field(default_factory=OutputSection)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # Without this, tyro would find the same texts by parsing this file, which imports NumPy.
        for field in cls.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                field.description = field.annotation.__doc__

    @model_validator(mode="after")
    def _sections_are_the_models(self) -> RunConfig:
        if type(self) is not config_class(self.model):
            raise ValueError(
                f"--model {self.model} has other options than these: give it without --config, --resume and "
                "--resume-from"
            )
        return self

    @model_validator(mode="after")
    def _data_are_of_the_models_medium(self) -> RunConfig:
        theirs, mine = medium(self.data.dataset), model_medium(self.model)
        if theirs != mine:
            raise ValueError(f"--dataset {self.data.dataset} is of {theirs}, --model {self.model} learns from {mine}")
        return self

    @property
    def pipeline(self) -> bool:
        """True if each process trains one part of the model."""
        return False

    @property
    def trained_modules(self) -> int | None:
        """Number of modules up to the last trained one, or None if no untrained modules follow it.

        The modules that follow keep the weights that the run started from.
        """
        return None

    @property
    def title(self) -> str:
        """Name of the run's model in figures."""
        return title(self.model)

    def idle(self) -> dict[str, str]:
        """Return the options that have no effect given the others, each with the reason."""
        idle = idle_of_dataset(self.data.dataset)
        if self.optimization.schedule == "constant":
            idle["final_lr"] = "--schedule constant keeps the learning rate"
        if self.optimization.optimizer == "adam":
            idle["momentum"] = "--optimizer adam has averages of its own"
        if self.optimization.time_budget is not None:
            idle["checkpoint_every"] = "--time-budget chooses it"
        return idle

    def remedies(self) -> list[str]:
        """Return options that may help a run that learns nothing, the most often helpful first."""
        lr = self.optimization.lr
        rates = f"another --lr than {lr:g}, such as {lr * 5:.2g} or {lr / 5:.2g}"
        steps, warmup = self.optimization.steps, 500
        if steps is not None:  # A run that warms up until its end never trains at its full rate.
            warmup = min(warmup, steps // 10)
        return [rates] if warmup <= 2.5 * self.optimization.warmup_steps else [rates, f"--warmup-steps {warmup}"]

    def shortcuts(self) -> list[str]:
        """Return options that shorten a run that takes hours without a GPU, the surest first."""
        return ["--time-budget 30, which is as many steps as half an hour has room for"]

    def to_yaml(self) -> str:
        """Return the text of a config.yaml, which :func:`load_config` reads back to an equal config."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _fields_of(config: type[RunConfig]) -> dict[str, FieldInfo]:
    """Return every field of a config's sections, by name."""
    return {
        name: option
        for field in config.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name, option in field.annotation.model_fields.items()
    }


def options_of_other_models(config: type[RunConfig]) -> dict[str, list[str]]:
    """Return the options that configs of this class lack: field names, each with the models that have it."""
    mine = _fields_of(config)
    others: dict[str, list[str]] = {}
    for model in MODELS:
        for name in _fields_of(config_class(model)):
            if name not in mine:
                others.setdefault(name, []).append(model)
    return others


def options_that_may_change() -> list[str]:
    """Return the field names of all options, of any model, that may change when a run is resumed."""
    fields = {name: field for model in MODELS for name, field in _fields_of(config_class(model)).items()}
    return sorted(name for name, field in fields.items() if MAY_CHANGE in field.metadata)


def validate_config(tree: dict[str, Any]) -> RunConfig:
    """Return the config of a dump. Raises ValidationError if it is not valid."""
    standard = RunConfig.model_fields["model"].default
    model = tree.get("model", standard)
    # Any class rejects the name of a model that does not exist.
    return config_class(model if model in MODELS else standard).model_validate(tree)


def load_config(path: Path, *, option_name: str = "--config") -> RunConfig:
    """Read a config.yaml.

    Args:
        path: the file.
        option_name: the option that named the file, for messages.

    Raises:
        TrainingError: the file is missing, not YAML, or not a valid config.
    """
    from cpc_ext.training.yaml_file import YAMLError, read_yaml

    try:
        tree = read_yaml(path)
    except OSError as error:
        raise TrainingError(f"{option_name}: cannot read {path}: {error.strerror}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise TrainingError(f"{option_name}: {path} is not a YAML file of options: {error}") from None
    if not isinstance(tree, dict):
        raise TrainingError(f"{option_name}: {path} does not hold a run's options (expected a mapping)")
    try:
        return validate_config(tree)
    except ValidationError as error:
        raise TrainingError(f"{option_name}: {path}:\n{explain(error)}") from None
