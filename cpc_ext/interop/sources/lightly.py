"""lightly (https://github.com/lightly-ai/lightly): encoders of its siamese networks, and back.

SimCLR, MoCo and the others of its examples hold the layers of a ResNet one by one in "backbone.", beside
"projection_head." and, where there is one, the encoder that follows it. Its own ResNetGenerator has no layer for the
ReLU behind the first convolution, which is therefore missing in such a sequence.
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
