"""Search of a folder for image files: see :mod:`cpc_ext.data.file_tree`."""

from __future__ import annotations

from pathlib import Path

import PIL

from cpc_ext.data.file_tree import FileKind, FileTree, read_tree
from cpc_ext.data.images.decode import image_suffixes

_OTHERS = frozenset((".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".webp"))


def read_images(root: Path, *, splits: bool = True) -> FileTree:
    """Find the images below root with :func:`read_tree`."""
    reader = f"Pillow {PIL.__version__}"
    kind = FileKind(("image", "images"), ".jpg, .png, .tif", image_suffixes(), _OTHERS, "image", reader)
    return read_tree(root, kind, splits=splits)
