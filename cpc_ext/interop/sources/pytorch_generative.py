"""Conversion of the gated PixelCNN of pytorch-generative (https://github.com/EugenHotaj/pytorch-generative), both ways.

All arguments of the model follow from names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.names import NameMap
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Form, Program, Reference, Settings, put_weights
from cpc_ext.models.pixels.binary_gated_pixelcnn import BinaryGatedPixelCNN

__all__ = ["PROGRAM", "PyTorchGenerative"]

_LAYERS = {
    "_vstack_1xN": "vertical_rows",
    "_vstack_Nx1": "vertical_columns",
    "_vstack_1x1": "vertical_own",
    "_link": "link",
    "_hstack_1xN": "horizontal",
    "_hstack_residual": "output",
    "_hstack_skip": "skip",
}
_NAMES = NameMap(
    [
        pair
        for theirs, ours in _LAYERS.items()
        for pair in (
            (f"_input.{theirs}.{{parameter}}", f"first.{ours}.{{parameter}}"),
            (f"_gated_layers.{{layer}}.{theirs}.{{parameter}}", f"layers.{{layer}}.{ours}.{{parameter}}"),
        )
    ]
    + [("_head.{layer}.{parameter}", "head.{layer}.{parameter}")]
)


class PyTorchGenerative(Program):
    """See the module. There is only one layout, so a form's layout is not used."""

    source = "pytorch-generative"
    settings = frozenset()

    def knows(self, name: str) -> bool:
        return _NAMES.ours(name) is not None

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        state = checkpoint.merged()
        unknown = [name for name in state if not self.knows(name)]
        if unknown or not state:
            raise self.refuse(checkpoint, unknown)
        weights = {str(_NAMES.ours(name)): value for name, value in state.items()}
        arguments = self._arguments(checkpoint, weights)
        model = BinaryGatedPixelCNN(**arguments)
        put_weights(model, weights, _NAMES.theirs, checkpoint.origin)
        return Reference(self.source, model, {"kind": "binary-pixels", "arguments": arguments}, form=Form())

    def _arguments(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, int]:
        shapes = []
        for name in ("first.vertical_rows.weight", "head.1.weight", "head.3.weight"):
            value = weights.get(name)
            if value is None or value.ndim != 4 or 0 in value.shape:
                raise CheckpointError(
                    f"{checkpoint.origin} is no gated PixelCNN of {self.source}, which has {_NAMES.theirs(name)} of "
                    "four dimensions"
                )
            shapes.append(value.shape)
        (channels, in_channels, *_), (head_channels, *_), (out_channels, *_) = shapes
        numbers = [name.split(".")[1] for name in weights if name.startswith("layers.")]
        layers = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
        return {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "layers": min(layers, len(weights)),
            "channels": channels,
            "head_channels": head_channels,
        }

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        if not isinstance(model, BinaryGatedPixelCNN):
            raise CheckpointError(f"{self.source} has no model like a {type(model).__name__}")
        return {str(_NAMES.theirs(name)): value for name, value in model.state_dict().items()}


PROGRAM = PyTorchGenerative()
