"""Trained models on the Hugging Face Hub, and in folders of the same form: weights, config.json and a model card.

:class:`Encoder` maps images to features, which is what most runs on images are for. :class:`Model` is the whole model
of a run, of any kind. Both save, load and upload by huggingface_hub's mixin, with safetensors and without running code
from files; the card gives the recipe and the results of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cpc_ext import __version__, models
from cpc_ext.data import PatchView, SimCLRView
from cpc_ext.evaluation.empty_task import empty_task, saved_run
from cpc_ext.models import PatchEncoder
from cpc_ext.tasks.encoder_options import EncoderConfig
from cpc_ext.training.config import explain, validate_config
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
except ImportError as error:
    raise ImportError(f"cpc_ext.hub needs the huggingface_hub library: pip install 'cpc_ext[hub]' ({error})") from error

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Encoder", "Model"]

_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ about }} Trained with cpc_ext {{ version }}.

```python
{{ usage }}
```
{% if results %}
## Results

| measure | value |
|---|---|
{% for name, value in results.items() -%}
| {{ name.replace("_", " ") }} | {{ value }} |
{% endfor %}{% endif %}{% if recipe %}
## Recipe

The run's config.yaml, which `python -m cpc_ext.train --config` takes:

```yaml
{{ recipe }}
```
{% endif %}"""
# How far floating-point images may lie outside of 0 to 1: resizing may overshoot a little.
_OVERSHOOT = 0.1
# Endings of the names of a summary's entries that measure the model.
_RESULTS = ("_accuracy", "bits_per_dim")


class _Saved(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cpc_ext",
    tags=["contrastive-predictive-coding", "self-supervised-learning"],
):
    """Base class of both models: the card, and errors that name the folder.

    record: facts about the run for the card: "cpc_ext", the version that trained the model; "run", the model's title
        and the data set; "results" by name; "recipe", the config as YAML.
    """

    record: dict[str, Any]
    about: ClassVar[str]
    usage: ClassVar[str]
    # The entry that config.json must have.
    needed: ClassVar[str]

    @property
    def title(self) -> str:
        """Title of the model in its card."""
        raise NotImplementedError

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the card of the model: how to use it, and the results and the recipe of the run."""
        results = self.record.get("results", {})
        card: ModelCard = ModelCard.from_template(
            card_data=self._hub_mixin_info.model_card_data,
            template_str=_CARD,
            title=self.title,
            about=self.about,
            usage=self.usage,
            version=self.record.get("cpc_ext", __version__),
            results={name: f"{value:.4g}" for name, value in sorted(results.items())},
            recipe=self.record.get("recipe", ""),
            **kwargs,
        )
        return card

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model from a folder, or from the Hub by its name, OWNER/NAME.

        ValueError, without a request to the Hub, where there is no such folder and the argument cannot be a name on
        the Hub.

        options: those of huggingface_hub's mixin.
        """
        given = str(pretrained_model_name_or_path)
        folder = Path(given).expanduser()
        if not folder.is_dir():
            _refuse_missing_folder(given, folder, is_path=isinstance(pretrained_model_name_or_path, Path))
        loaded: Self = super().from_pretrained(str(folder), **options)
        return loaded

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **options: Any) -> Self:
        if cls.needed not in options:
            raise ValueError(f"{model_id} holds no {cls.__name__} of cpc_ext: its config.json has no {cls.needed!r}")
        try:
            loaded: Self = super()._from_pretrained(model_id=model_id, strict=strict, **options)
        except (RuntimeError, FileNotFoundError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{model_id}: its weights are missing, damaged, or of another model: {reason}") from None
        return loaded


class Encoder(_Saved, pipeline_tag="image-feature-extraction"):
    """A trained encoder with the view that it was trained on: from images to features.

    ``Encoder.of_run("RUN").save_pretrained("folder")`` writes config.json, model.safetensors and, where there is none
    yet, README.md; ``push_to_hub("name/of-it")`` uploads them; ``Encoder.from_pretrained("folder")``, or a name on the
    Hub in place of the folder, loads the encoder in evaluation mode.

    In other pipelines it takes the place of the backbone before the classifier: it also takes images of torchvision's
    ``ToTensor``, floating point in 0..1, and ``num_features`` is D, as in timm's models without a classifier. For
    feature maps in place of features, wrap ``encoder`` in :class:`~cpc_ext.models.ImageBackbone`.

    Args:
        kind: name of the encoder's class in :mod:`cpc_ext.models`.
        arguments: arguments of the class, JSON values.
        view: fields of the :class:`~cpc_ext.data.PatchView` or :class:`~cpc_ext.data.SimCLRView` to apply to images.
        record: facts about the run for the card, as :meth:`of_run` collects them.

    Attributes:
        num_features: D, the number of features of an image.

    Raises:
        ValueError: unknown class, or arguments or a view that it does not take.
    """

    about = "An encoder of images, from uint8 images to features."
    usage = (
        "from cpc_ext import hub  # pip install 'cpc_ext[hub]'\n\n"
        'encoder = hub.Encoder.from_pretrained("FOLDER OR NAME")\n'
        "features = encoder(images)  # uint8 [B, C, H, W] → [B, D]"
    )
    needed = "kind"

    def __init__(
        self,
        kind: str,
        arguments: dict[str, Any],
        view: dict[str, Any],
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        found = getattr(models, kind, None)
        if not (isinstance(found, type) and issubclass(found, PatchEncoder)):
            raise ValueError(f"kind must be an encoder of images of cpc_ext.models, got {kind!r}")
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in view.items()
        }
        try:
            self.view: PatchView | SimCLRView = (PatchView if "patch_size" in fields else SimCLRView)(**fields)
            self.encoder = found(**arguments)
        except TypeError as error:
            raise ValueError(f"{kind}: arguments or view are of another version of cpc_ext: {error}") from None
        self.kind = kind
        self.num_features = self.encoder.out_channels
        self.record = record or {}

    @classmethod
    def of_run(cls, path: str | Path) -> Self:
        """Return the encoder of a finished run on images, in evaluation mode.

        TrainingError where the folder holds no encoder, or its last modules are not trained yet.
        """
        run = RunDir(Path(path))
        config = run.known_config
        end = config.trained_modules if isinstance(config, EncoderConfig) else None
        if end is not None:
            raise TrainingError(
                f"{path} trained module {end - 1} and not those after it, whose weights are those of its start: train "
                f"them (--train-module {end} --resume-from {path}); what its own probe sees, cpc_ext.embed takes"
            )
        if not run.encoder.is_file():
            raise TrainingError(f"{path} holds no {run.encoder.name}: its run is not finished, or learns no encoder")
        try:
            with safe_open(run.encoder, "pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{run.encoder} is damaged or cut short ({error})") from None
        if "view" not in metadata:
            raise TrainingError(f"{path} is a run of {config.model}: cpc_ext.hub.Model takes it")
        arguments, view = (json.loads(metadata[name]) for name in ("encoder", "view"))
        saved = cls(kind=metadata["class"], arguments=arguments, view=view, record=_record(run))
        saved.encoder.load_state_dict(weights)
        return saved.eval()

    @property
    def title(self) -> str:
        return f"{self.kind} of {self.record.get('run', 'cpc_ext')}"

    def encodings(self, images: Tensor) -> Tensor:
        """Encode each patch: [B, C, H, W] → [B, D, rows, cols], 1 x 1 for encoders of whole images.

        Images are uint8, or floating point in 0..1, which is rounded to 256 levels. They have the size of the data set,
        from which a view of patches crops the center, or any size where the view takes whole images. ValueError for
        another shape or range, TypeError for another dtype.
        """
        self._check(images)
        if images.is_floating_point():
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        made: Tensor = self.view.center(images)
        dtype = next(self.encoder.parameters()).dtype
        encodings: Tensor = self.encoder((made[:, None, None] if made.ndim == 4 else made).to(dtype))
        return encodings

    def _check(self, images: Tensor) -> None:
        """Raise ValueError for tensors that are not images, or not of the kind that the encoder was trained on."""
        if images.ndim != 4:
            raise ValueError(f"images: expected [B, C, H, W], got {list(images.shape)}")
        # A view that turns images to grey does not say how many channels they have.
        mean = None if getattr(self.view, "gray", False) else self.view.mean
        if mean is not None and images.shape[1] != len(mean):
            raise ValueError(f"images: the encoder was trained on {len(mean)} channels, got {images.shape[1]}")
        if not images.is_floating_point() or torch.compiler.is_compiling() or not images.numel():
            return
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not -_OVERSHOOT <= low <= high <= 1 + _OVERSHOOT:
            raise ValueError(
                f"images: floating point is from 0 to 1, got {low:.3g} to {high:.3g}; the encoder itself normalises"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] as a probe sees them: the mean over the patches, [B, D]."""
        return self.encodings(images).mean((2, 3))


class Model(_Saved):
    """The whole model of a run, of images, sound or pixels, with context networks, heads and predictors.

    It saves, loads and uploads as :class:`Encoder` does.

    Args:
        options: the run's config, as :meth:`RunConfig.model_dump` gives it in JSON values.
        image_shape: (C, H, W) of the images, where the model is built for one size.
        classes: number of classes that the model was built for; 0 if it uses no labels.
        record: facts about the run for the card, as :meth:`of_run` collects them.

    Attributes:
        model: the model, of a class of :mod:`cpc_ext.models`.

    Raises:
        ValueError: options that are not the config of a run.
    """

    about = "A whole model, with all that it was trained with."
    usage = (
        "from cpc_ext import hub  # pip install 'cpc_ext[hub]'\n\n"
        'model = hub.Model.from_pretrained("FOLDER OR NAME").model'
    )
    needed = "options"

    def __init__(
        self,
        options: dict[str, Any],
        image_shape: list[int] | None = None,
        classes: int = 0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            self.options = validate_config(options)
        except ValidationError as error:
            raise ValueError(f"options are of another version of cpc_ext: {explain(error)}") from None
        self.model = empty_task(self.options, image_shape, classes).model
        self.record = record or {}

    @classmethod
    def of_run(cls, path: str | Path) -> Self:
        """Return the model of a run's last checkpoint, in evaluation mode.

        Its weights are their running average where the run keeps one. TrainingError where the folder holds no
        checkpoint.
        """
        found = saved_run(Path(path))
        record = _record(RunDir(Path(path)))
        shape = None if found.image_shape is None else list(found.image_shape)
        options = _shared(found.config.model_dump(mode="json"))
        saved = cls(options=options, image_shape=shape, classes=found.classes, record=record)
        weights = found.task.model.state_dict()
        saved.model.to(next(value.dtype for value in weights.values() if value.is_floating_point()))
        saved.model.load_state_dict(weights)
        return saved.eval()

    @property
    def title(self) -> str:
        return f"{self.options.title} on {self.options.data.dataset}"

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the model."""
        return self.model(*inputs, **options)


def _refuse_missing_folder(given: str, folder: Path, *, is_path: bool) -> None:
    """Raise ValueError if the argument can only be meant as a folder: several requests to the Hub would fail."""
    if folder.is_file():
        raise ValueError(f"{given} is a file: give the folder that holds it, with config.json and model.safetensors")
    is_path = is_path or given.startswith((".", "/", "~")) or given.count("/") != 1
    if is_path or folder.parent.is_dir():
        beside = "" if is_path else f", and {folder.parent} is a folder here, where the Hub is not asked for {given}"
        raise ValueError(f"there is no folder {given}{beside}; models on the Hub are called OWNER/NAME")


def _record(run: RunDir) -> dict[str, Any]:
    """Return the facts of a run for its card: the version, the results if it is finished, and its config."""
    results: dict[str, Any] = {}
    if run.summary.is_file():
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        results = {name: value for name, value in summary.items() if _tells_worth(name, value)}
    config = run.known_config
    return {
        "cpc_ext": __version__,
        "run": f"{config.title} on {config.data.dataset}",
        "results": results,
        # YAML as text keeps the order of the options.
        "recipe": yaml.safe_dump(_shared(config.model_dump(mode="json")), sort_keys=False).rstrip(),
    }


def _tells_worth(name: str, value: Any) -> bool:
    """Return whether an entry of a summary measures the finished model: one number, and not of the last steps."""
    return name.endswith(_RESULTS) and not name.startswith("final_") and isinstance(value, int | float)


def _shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that can be published: without the paths and the device of the machine that it ran on."""
    # A run that trains one module of several starts from the run that trained the others; only its name is kept.
    start = options["optimization"]["resume_from"] if options.get("greedy", {}).get("train_module") else None
    return {
        **options,
        "data": {**options["data"], "data_dir": None},
        "optimization": {**options["optimization"], "resume_from": start and Path(start).name},
        "compute": {**options["compute"], "device": "cpu"},
    }
