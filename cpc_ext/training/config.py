"""Everything that determines a run, as one typed tree that the command line and config.yaml both fill.

Each section is a group of options: a field is the option of the same name, its description the help text, its bounds
what is checked. Defaults here are those of any run; what depends on the data set lies in presets.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cpc_ext.training.encoder_names import check_encoder_name
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import check_device_name

__all__ = [
    "CPCConfig",
    "CPCSection",
    "CPCv2Config",
    "CPCv2Section",
    "DataSection",
    "DeviceSection",
    "GreedyConfig",
    "GreedySection",
    "OptimizationSection",
    "OptionError",
    "OutputSection",
    "PixelCNNConfig",
    "PixelCNNPPConfig",
    "PixelCNNPPSection",
    "PixelCNNSection",
    "RunConfig",
    "SimCLRConfig",
    "SimCLRSection",
    "ViewSection",
    "config_class",
    "load_config",
    "option",
    "options_of_other_models",
    "validate_config",
]

Model = Literal["cpc-v1", "cpc-v2", "pixelcnn", "gated-pixelcnn", "pixelcnn++", "simclr", "greedy-infomax"]
DatasetName = Literal["textures", "stl10", "cifar10", "cifar100", "folder"]
Encoder = Annotated[str, AfterValidator(check_encoder_name)]
Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "constant"]
GatherNegatives = Literal["none", "gather", "ring"]
Norm = Literal["none", "layer", "batch", "instance"]

# Sides and channels up to which a network, or an image, can be meant.
_MOST = 2**16
# Characters of a wrong value that a message has room for.
_SHOWN = 200
_NORM = "Normalisation inside the encoder; a backbone of timm has its own."


class OptionError(ValueError):
    """Options that are wrong or do not go together; the message names them, a line each."""


class _Section(BaseModel):
    # Built when it is first filled: a program needs the sections of one model.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), defer_build=True
    )

    def __init__(self, **values: Any) -> None:
        # The command line shows the error's own words; they are to name options, not pydantic's internals.
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionError(explain(error)) from None


def option(name: str) -> str:
    """The command line's spelling of a field: "batch_size" → "--batch-size"."""
    return "--" + name.replace("_", "-")


def explain(error: ValidationError) -> str:
    """A validation error as one line an option: which, what is allowed, what came."""
    lines = []
    for entry in error.errors():
        # Fields are unique over all sections, so the innermost field name is the option; branches of a union follow it.
        names = [str(part) for part in entry["loc"] if str(part).isidentifier()]
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "value_error":
            lines.append(message)
        elif entry["type"] == "extra_forbidden":
            place = ".".join(map(str, entry["loc"]))
            lines.append(f"{place}: there is no such option")
        else:
            field = next((name for name in reversed(names) if name in _FIELDS), names[-1] if names else "config")
            came = repr(entry["input"])
            came = came if len(came) <= _SHOWN else f"{came[:_SHOWN]}..."
            lines.append(f"{option(field)}: {message[0].lower()}{message[1:]}, got {came}")
    return "\n".join(dict.fromkeys(lines))


class DataSection(_Section):
    """The images to learn from."""

    dataset: DatasetName = Field(
        "textures",
        description="Images to train on; it also chooses the defaults of most other options (see them with "
        "--dataset NAME --help). textures is drawn in seconds and needs no files.",
    )
    data_dir: Path | None = Field(
        None,
        description="Folder of the data set's files, or of your images for --dataset folder. None: the user's cache.",
    )
    download: bool = Field(False, description="Fetch the data set's published files where they are missing.")
    image_size: Annotated[int, Field(ge=16, le=_MOST)] | None = Field(
        None,
        description="Side in pixels that textures are drawn at or a folder's images are resized to. None: the data "
        "set's own size.",
    )


class ViewSection(_Section):
    """What the model sees of an image: a crop, cut into a grid of overlapping patches."""

    crop: int = Field(
        56, ge=4, le=_MOST, description="Side in pixels of the square cut out of an image at a random place."
    )
    pad: int = Field(0, ge=0, le=_MOST, description="Black pixels put around an image before it is cropped.")
    grid_size: int = Field(6, ge=2, le=_MOST, description="Patches along a side of the grid.")
    patch_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Side of a patch in pixels. None: neighbours overlap by half, 2 * crop / (grid size + 1)."
    )
    flip: bool = Field(True, description="Mirror half of the crops left to right.")
    gray: bool = Field(True, description="Reduce colours to grey, which closes the short cut of matching colours.")
    patch_norm: bool = Field(
        False,
        description="Bring each patch to its own zero mean and unit contrast, which closes the short cut of matching "
        "brightness; otherwise pixels are normalised by the data set's mean and deviation.",
    )
    patch_augmentation: bool = Field(
        False,
        description="Change each patch on its own while training, as CPC v2 does it: two of AutoAugment's transforms, "
        "then, with the paper's probabilities, elastic deformation, another colour histogram, colour jitter and grey, "
        "then a crop padded back.",
    )

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return 2 * self.crop // (self.grid_size + 1) if self.patch_size is None else self.patch_size

    @property
    def stride(self) -> int:
        """Distance of neighbouring patches in pixels."""
        return (self.crop - self.patch) // (self.grid_size - 1)

    @model_validator(mode="after")
    def _grid_fills_crop(self) -> ViewSection:
        if self.patch_size is None and 2 * self.crop % (self.grid_size + 1):
            fitting = self.crop - self.crop % (self.grid_size + 1)
            raise ValueError(
                f"--crop {self.crop} does not divide into half-overlapping patches on a {self.grid_size} x "
                f"{self.grid_size} grid: use a multiple of {self.grid_size + 1} such as "
                f"{fitting or self.grid_size + 1}, or give --patch-size"
            )
        if self.patch > self.crop:
            raise ValueError(f"--patch-size {self.patch} is larger than --crop {self.crop}")
        if self.stride < 1 or self.patch + self.stride * (self.grid_size - 1) != self.crop:
            raise ValueError(
                f"--patch-size {self.patch} on a {self.grid_size} x {self.grid_size} grid does not fill --crop "
                f"{self.crop}: crop - patch size must be a positive multiple of grid size - 1 = {self.grid_size - 1}"
            )
        return self


class _ContrastiveSection(_Section):
    """What all models that learn an encoder by contrast share."""

    encoder: Encoder = Field(
        "resnet14",
        description="Network that encodes a patch, or of simclr an image. resnet-small, resnetN: a pre-activation "
        "ResNet; 14, 28, 41, 92 and 143 without the last stack, as published for CPC, 161 that of CPC v2, 18, 34, 50, "
        "101 and 152 whole, small with one narrow block a stack. wrn-DEPTH-WIDTH: a wide ResNet, such as wrn-28-2. "
        "mobilenetv2. ln-resnet101: Lightning Bolts' cpc_encoder. timm:NAME: any backbone of the timm library, if "
        "installed (cpc_ext[timm]), such as timm:convnext_atto. What a name leaves open may follow it, as in "
        "resnet14:stem=cifar or timm:vit_tiny_patch16_224:patch_size=4.",
    )
    norm: Norm = Field("none", description=f"{_NORM} The published CPC v1 uses none.")
    gather_negatives: GatherNegatives = Field(
        "gather",
        description="Negatives of a run of several processes (torchrun). gather, also without a value: of all "
        "processes, as a single one with the whole batch has them; ring: the same, but no process holds the keys of "
        "more than one other at a time; none: each process's own.",
    )


class _PredictionSection(_ContrastiveSection):
    """What both versions of contrastive predictive coding share."""

    context_layers: int = Field(
        4, ge=1, le=1000, description="Layers of the context network; each sees one row further up."
    )
    pred_steps: int = Field(5, ge=1, description="Rows ahead that are predicted, nearest to farthest.")
    pred_directions: int = Field(
        1, ge=1, le=4, description="Directions predicted in: 1 is down, 2 to 4 add the grid turned by 90 degrees each."
    )
    skip: int = Field(
        1,
        ge=0,
        description="Rows left out between a context and its first target, whose patches overlap the context's.",
    )


class CPCSection(_PredictionSection):
    """The networks and the prediction task of contrastive predictive coding."""

    neg_samples: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        16, description="Negatives sampled for each prediction, or all: every other target in the batch."
    )

    @model_validator(mode="after")
    def _ring_holds_all(self) -> CPCSection:
        if self.gather_negatives == "ring" and self.neg_samples != "all":
            raise ValueError("--gather-negatives ring needs --neg-samples all: samples may be keys of any process")
        return self


class CPCv2Section(_PredictionSection):
    """The networks and the prediction task of contrastive predictive coding, version 2."""

    norm: Norm = Field("layer", description=f"{_NORM} CPC v2 has layer norm.")
    context_layers: int = Field(
        5, ge=1, le=1000, description="Residual blocks of a context network; each sees one row further up."
    )
    context_channels: int = Field(256, ge=1, le=_MOST, description="Channels inside a block of a context network.")
    shared_context: bool = Field(
        False,
        description="One context network for all directions, as in CPCV2-PyTorch; otherwise each has its own.",
    )
    pred_directions: int = Field(
        4, ge=1, le=4, description="Directions predicted in: 1 is down, 2 to 4 add the grid turned by 90 degrees each."
    )
    target_channels: int = Field(
        64,
        ge=1,
        le=_MOST,
        description="Channels of the projections that are predicted and contrasted with all of the batch.",
    )
    prediction_scale: float = Field(
        0.1, gt=0, le=100, description="Factor of the predictions, and so of the logits at the start."
    )
    variant: Literal["paper", "lightning-bolts"] = Field(
        "paper",
        description="lightning-bolts: as that program's CPC_v2, which pads context networks in its own way, predicts "
        "all steps by one convolution and weighs step k by k; for one direction and all steps that the grid has.",
    )


class GreedySection(_Section):
    """The modules of Greedy InfoMax, what they learn by, and in which order or place."""

    modules: int = Field(
        3,
        ge=1,
        le=1000,
        description="Modules that the encoder's stacks are shared among, each with a loss of its own. 1 is the encoder "
        "end to end, with a context network: CPC.",
    )
    split_at: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="Blocks that all modules but the first begin with, counted from 0 over all stacks; replaces "
        "--modules.",
    )
    objective: Literal["infonce", "supervised"] = Field(
        "infonce",
        description="What a module learns by: InfoNCE, or the labels through a linear classifier of its own (with "
        "--modules 1 a supervised encoder end to end).",
    )
    init: Literal["he", "delta-orthogonal"] = Field(
        "he",
        description="Initial weights of the encoder: He et al.'s, or Xiao et al. 2018's, arXiv 1806.05393.",
    )
    train_module: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Train this module alone, counted from 0; those before it are frozen, as the run of --resume-from "
        "has trained them. None: all at once.",
    )
    cache_outputs: Path | None = Field(
        None,
        description="Folder to keep the outputs of the frozen modules in, computed once and read from the disk. It "
        "fixes the crops: --cache-views of each image. None: they are computed in every step, for new crops.",
    )
    cache_views: int = Field(
        1, ge=1, description="Random crops of each image whose outputs are kept with --cache-outputs."
    )
    pipeline: bool = Field(
        False,
        description="Under torchrun: a process, and GPU, for every module, which gets the features of the one before. "
        "Otherwise each process trains all modules on its part of a batch.",
    )

    @property
    def count(self) -> int:
        """Number of modules."""
        return self.modules if self.split_at is None else len(self.split_at) + 1

    @model_validator(mode="after")
    def _options_fit(self) -> GreedySection:
        if self.train_module is not None and self.train_module >= self.count:
            raise ValueError(f"--train-module {self.train_module}: there are {self.count} modules, counted from 0")
        if self.cache_outputs is not None and not self.train_module:
            raise ValueError("--cache-outputs needs --train-module 1 or higher: only frozen modules are cached")
        if self.pipeline and (self.train_module is not None or self.count == 1):
            raise ValueError("--pipeline trains several modules at a time: it needs --modules and no --train-module")
        return self


class SimCLRSection(_ContrastiveSection):
    """The networks, the views and the loss of SimCLR."""

    view_size: int = Field(96, ge=8, le=_MOST, description="Side in pixels of the two views of an image.")
    min_crop_area: float = Field(
        0.08, gt=0, le=1, description="Smallest share of an image's area that a view shows; the largest is all of it."
    )
    blur_kernel: int = Field(
        9,
        ge=0,
        le=_MOST,
        description="Taps of the Gaussian blur of a view, an odd number, about a tenth of its side. 0: none.",
    )
    projection_channels: int = Field(
        128, ge=1, le=_MOST, description="Features that the loss compares, behind a hidden layer of four times as many."
    )
    temperature: float = Field(0.07, gt=0, le=100, description="Divisor of the cosine similarities.")


class PixelCNNSection(_Section):
    """The network that predicts every value of an image from those before it, and what is looked at on the way."""

    layers: int = Field(
        12,
        ge=1,
        le=1000,
        description="Residual blocks of a PixelCNN, layers of a gated one; each sees one pixel further.",
    )
    hidden_channels: int = Field(
        96,
        ge=1,
        le=_MOST,
        description="Channels, a multiple of the colours: h of a PixelCNN, which carries 2h between its blocks, or p "
        "of each stack of a gated one.",
    )
    class_conditional: bool = Field(
        False,
        description="Tell the network the class of an image; of gated-pixelcnn and pixelcnn++, and for images with "
        "labels.",
    )
    mirror: bool = Field(False, description="Mirror half of the training images left to right.")
    sample_every: int = Field(
        500,
        ge=1,
        description="Updates between looks at the model: bits per dimension of held-out images, and samples as PNG.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Evaluate, draw from and save a running average of the weights in which an update keeps this share "
        "of it, less in the first updates; published for PixelCNN++: 0.9995. 0: the weights themselves.",
    )


class PixelCNNPPSection(PixelCNNSection):
    """The network that predicts every pixel of an image from those before it, and what is looked at on the way."""

    layers: int = Field(
        2, ge=1, le=1000, description="Gated blocks of a stream at each of three resolutions. Published: 5."
    )
    hidden_channels: int = Field(96, ge=1, le=_MOST, description="Channels of each of the two streams. Published: 160.")
    mixtures: int = Field(10, ge=1, le=1000, description="Logistic distributions that are mixed for a pixel.")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="Probability of leaving a channel out of a gated block while training."
    )
    data_init: bool = Field(
        True,
        description="Start from weights with which, on a batch of the images, all layers give values of mean 0 and "
        "deviation 1.",
    )


class OptimizationSection(_Section):
    """Where to start, how long and how fast to learn. Adam, or AdamW where weights decay."""

    resume_from: Path | None = Field(
        None,
        description="Start a new run from the weights of another run's model, whose folder this is; its options are "
        "the defaults of all others. None: from those of the seed.",
    )
    epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Length of the run in passes over the images (excludes --steps)."
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Length of the run in parameter updates (excludes --epochs)."
    )
    batch_size: int = Field(16, ge=1, description="Images in an update.")
    lr: float = Field(2e-4, gt=0, le=10, allow_inf_nan=False, description="Learning rate, at its highest.")
    schedule: Schedule = Field(
        "constant", description="Learning rate after the warm-up: constant, or a half cosine to --final-lr at the end."
    )
    final_lr: float = Field(
        0.0, ge=0, le=1, description="Where the cosine ends, as a share of --lr; of a constant schedule no matter."
    )
    warmup_steps: int = Field(0, ge=0, description="Updates over which the learning rate rises linearly from zero.")
    clip_grad: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Norm that the gradient of all parameters together is cut to. None: not cut."
    )

    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the learning rate by which an update of AdamW shrinks weights; 0 is Adam.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> OptimizationSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either --epochs or --steps" + (", not both" if self.epochs else ""))
        return self


class DeviceSection(_Section):
    """Where and how to compute."""

    device: str = Field(
        "cpu", description="Where to compute: cpu, cuda, cuda:1, mps. An accelerator is taken where there is one."
    )
    precision: Precision = Field(
        "fp32",
        description="Number format of convolutions and products; parameters stay fp32. bf16 is chosen where the device "
        "computes it natively; fp16 is for GPUs without bf16, and slow on a CPU.",
    )
    channels_last: bool = Field(True, description="Lay images out with their channels innermost, faster nearly always.")
    compile: bool = Field(
        False, description="Compile the model with torch.compile: minutes at the start, faster steps."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Determines weights, order, crops and negatives of the run.")

    @model_validator(mode="after")
    def _device_exists(self) -> DeviceSection:
        check_device_name(self.device)
        return self


class OutputSection(_Section):
    """What is written while training."""

    log_every: int = Field(
        20, ge=1, description="Updates between lines of metrics.jsonl, each the mean since the last."
    )
    checkpoint_every: int = Field(
        500, ge=1, description="Updates between checkpoints; one is always written at the end."
    )


class RunConfig(_Section):
    """A run: two runs of equal config on one machine and number of threads give equal metrics on the CPU.

    What all models share; :func:`config_class` gives the class with a model's own sections.
    """

    model: Model = Field(
        "cpc-v1",
        description="What to train; it decides which options there are. cpc-v1: van den Oord et al. 2018, arXiv "
        "1807.03748. cpc-v2: Hénaff et al. 2019, arXiv 1905.09272. pixelcnn: 2016, arXiv 1601.06759. gated-pixelcnn: "
        "2016, arXiv 1606.05328. pixelcnn++: Salimans et al. 2017, arXiv 1701.05517. simclr: Chen et al. 2020, arXiv "
        "2002.05709. greedy-infomax: Löwe et al. 2019, arXiv 1905.11786.",
    )
    data: DataSection = Field(default_factory=DataSection)
    optimization: OptimizationSection
    compute: DeviceSection = Field(default_factory=DeviceSection)
    output: OutputSection = Field(default_factory=OutputSection)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # The command line would find the same words by parsing this file, at the price of an import of NumPy.
        for field in cls.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
                field.description = field.annotation.__doc__

    @model_validator(mode="after")
    def _sections_are_the_models(self) -> RunConfig:
        if type(self) is not config_class(self.model):
            raise ValueError(
                f"--model {self.model} has other options than these: give it without --config and --resume-from"
            )
        return self

    @property
    def pipeline(self) -> bool:
        """Whether each process trains a part of the model."""
        return False

    def to_yaml(self) -> str:
        """As the text of a config.yaml, which :func:`load_config` reads back to an equal config."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _PredictionConfig(RunConfig):
    view: ViewSection = Field(default_factory=ViewSection)
    cpc: _PredictionSection

    @model_validator(mode="after")
    def _predictions_fit_grid(self) -> _PredictionConfig:
        farthest, last = self.cpc.pred_steps + self.cpc.skip, self.view.grid_size - 1
        if farthest > last:
            raise ValueError(
                f"--pred-steps {self.cpc.pred_steps} with --skip {self.cpc.skip} predicts {farthest} rows ahead, but "
                f"--grid-size {self.view.grid_size} has only {last} rows below the first: they may sum to {last}"
            )
        return self


class CPCConfig(_PredictionConfig):
    """A run of contrastive predictive coding."""

    cpc: CPCSection = Field(default_factory=CPCSection)


class CPCv2Config(_PredictionConfig):
    """A run of contrastive predictive coding, version 2."""

    cpc: CPCv2Section = Field(default_factory=CPCv2Section)

    @model_validator(mode="after")
    def _variant_predicts_all(self) -> CPCv2Config:
        options, steps = self.cpc, self.view.grid_size - 1 - self.cpc.skip
        if options.variant == "lightning-bolts" and (options.pred_directions, options.pred_steps) != (1, steps):
            raise ValueError(
                f"--variant lightning-bolts predicts in one direction, and all {steps} steps that --grid-size "
                f"{self.view.grid_size} has: it needs --pred-directions 1 --pred-steps {steps}"
            )
        return self


class GreedyConfig(CPCConfig):
    """A run of Greedy InfoMax, or of the supervised encoders it is compared with."""

    greedy: GreedySection = Field(default_factory=GreedySection)

    @model_validator(mode="after")
    def _modules_before_are_trained(self) -> GreedyConfig:
        module = self.greedy.train_module
        if module and self.optimization.resume_from is None:
            raise ValueError(
                f"--train-module {module} needs --resume-from, the folder of the run that trained module {module - 1}"
            )
        return self

    @property
    def pipeline(self) -> bool:
        return self.greedy.pipeline


class SimCLRConfig(RunConfig):
    """A run of SimCLR."""

    simclr: SimCLRSection = Field(default_factory=SimCLRSection)


class PixelCNNConfig(RunConfig):
    """A run of a PixelCNN, gated or not."""

    pixelcnn: PixelCNNSection = Field(default_factory=PixelCNNSection)

    @model_validator(mode="after")
    def _model_takes_classes(self) -> PixelCNNConfig:
        if self.pixelcnn.class_conditional and self.model == "pixelcnn":
            raise ValueError("--class-conditional needs --model gated-pixelcnn or pixelcnn++, got pixelcnn")
        return self


class PixelCNNPPConfig(PixelCNNConfig):
    """A run of PixelCNN++."""

    pixelcnn: PixelCNNPPSection = Field(default_factory=PixelCNNPPSection)


_CONFIGS: dict[str, type[RunConfig]] = {
    "cpc-v1": CPCConfig,
    "cpc-v2": CPCv2Config,
    "pixelcnn": PixelCNNConfig,
    "gated-pixelcnn": PixelCNNConfig,
    "pixelcnn++": PixelCNNPPConfig,
    "simclr": SimCLRConfig,
    "greedy-infomax": GreedyConfig,
}


def config_class(model: str) -> type[RunConfig]:
    """The class of a model's configs. KeyError for a name that does not exist."""
    return _CONFIGS[model]


def _fields_of(config: type[RunConfig]) -> dict[str, str]:
    """Every field of a config's sections, with the section."""
    return {
        name: section
        for section, field in config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
        for name in field.annotation.model_fields
    }


# The names of options, of any model.
_FIELDS = frozenset(RunConfig.model_fields).union(*map(_fields_of, _CONFIGS.values()))


def options_of_other_models(config: type[RunConfig]) -> dict[str, list[str]]:
    """The options that runs of this class do not have: a field's name with the models that have it."""
    mine = _fields_of(config)
    others: dict[str, list[str]] = {}
    for model, other in _CONFIGS.items():
        for name in _fields_of(other):
            if name not in mine:
                others.setdefault(name, []).append(model)
    return others


def validate_config(tree: dict[str, Any]) -> RunConfig:
    """A config from its dump. ValidationError where it is not valid."""
    model = tree.get("model")
    # That of the default model also reads, and refuses, models that do not exist.
    config = _CONFIGS.get(model, CPCConfig) if isinstance(model, str) else CPCConfig
    return config.model_validate(tree)


def load_config(path: Path, *, option_name: str = "--config") -> RunConfig:
    """Read a config.yaml. TrainingError where it is missing, not YAML, or not a valid config.

    option_name: the option that asks for it, for messages.
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
