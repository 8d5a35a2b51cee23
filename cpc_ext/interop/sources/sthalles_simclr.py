"""Conversion of encoders from SimCLR by sthalles (https://github.com/sthalles/SimCLR), both ways.

Checkpoints hold one of torchvision's ResNets under "backbone.", whose "fc" is the projection head. In earlier versions
its layers are a sequence under "features.", beside the head's "l1." and "l2.". The stem is ImageNet's for images of any
size.
"""

from __future__ import annotations

from cpc_ext.interop.siamese import SiameseProgram

__all__ = ["PROGRAM", "SthallesSimCLR"]


class SthallesSimCLR(SiameseProgram):
    """See the module."""

    source = "sthalles-simclr"
    prefixes = ("backbone.", "features.")
    sizes = (32, 96)


PROGRAM = SthallesSimCLR()
