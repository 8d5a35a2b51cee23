"""How large the images of a folder are, from the heads of a few of them: what chooses a run's defaults."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median

__all__ = ["typical_side"]

# Images that are looked at, and of how many files they may be, lest a folder of other files is read through.
_IMAGES, _FILES = 24, 400
# Files that are looked at in one folder, so that others have their turn.
_OF_FOLDER = 8


def typical_side(folder: Path) -> int | None:
    """The median of the shorter sides, in pixels, of some images in a folder and those below it.

    None where none can be read, of which whoever loads them tells more.
    """
    from PIL import Image, UnidentifiedImageError

    sides: list[int] = []
    looked = 0
    for place, folders, names in os.walk(folder.expanduser()):
        folders.sort()
        for name in sorted(names)[:_OF_FOLDER]:
            looked += 1
            if len(sides) == _IMAGES or looked > _FILES:
                return round(median(sides)) if sides else None
            try:
                with Image.open(Path(place, name)) as image:
                    sides.append(min(image.size))
            except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
                continue
    return round(median(sides)) if sides else None
