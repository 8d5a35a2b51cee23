"""solo-learn (https://github.com/vturrisi/solo-learn): encoders of all its methods that have a ResNet, and back.

Of CIFAR's small images they begin with a convolution of 3x3 within a border of two zeros. "projector.", "classifier."
and "momentum_backbone." are kept beside the model.
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
