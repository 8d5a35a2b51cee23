"""SimCLR of sthalles (https://github.com/sthalles/SimCLR): its encoder, and back.

A ResNet of torchvision's in "backbone.", whose "fc" is the projection head; in earlier versions its layers one by one
in "features.", beside the head's "l1." and "l2.". Images of all sizes have the first layers of ImageNet's.
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
