"""Conversion of ResNet encoders of solo-learn (https://github.com/vturrisi/solo-learn), from any method, both ways.

For CIFAR's small images they begin with a 3x3 convolution with a padding of 2. "projector.", "classifier." and
"momentum_backbone." are kept beside the model.
"""

from __future__ import annotations

from cpc_ext.interop.siamese import SiameseProgram

__all__ = ["PROGRAM", "SoloLearn"]


class SoloLearn(SiameseProgram):
    """See the module."""

    source = "solo-learn"
    prefixes = ("backbone.", "encoder.")
    stem = "solo-learn"
    small_stems = (stem,)


PROGRAM = SoloLearn()
