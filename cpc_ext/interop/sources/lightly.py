"""Conversion of encoders of lightly's siamese networks (https://github.com/lightly-ai/lightly), both ways.

SimCLR, MoCo and the others of its examples hold the layers of a ResNet as a sequence under "backbone.", beside
"projection_head." and, in some, a momentum encoder. Its own ResNetGenerator has no layer for the ReLU after the first
convolution, so the sequence made of such a network does not apply it.
"""

from __future__ import annotations

from cpc_ext.interop.siamese import SiameseProgram

__all__ = ["PROGRAM", "Lightly"]


class Lightly(SiameseProgram):
    """See the module."""

    source = "lightly"
    prefixes = ("backbone.", "model.backbone.", "resnet_simclr.backbone.")
    layout = "numbers"
    small_stems = ("cifar", "lightly")


PROGRAM = Lightly()
