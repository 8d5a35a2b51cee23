"""Arrays in HDF5 files, in groups of any depth; their names say what they hold, as in NumPy's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.images.array_sets import arrays_dataset, named_arrays
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.source_files import HDF5_SUFFIXES, SourceFiles, source_files
from cpc_ext.data.libraries import optional

_WHAT = ("HDF5 file", "HDF5 files")


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open the arrays of an HDF5 file, or of all below a folder, as :func:`cpc_ext.data.images.arrays.npy.load` does.

    Contiguous uint8 arrays are memory-mapped; others, such as chunked or compressed ones, are read once into the cache.
    Variable-length uint8 is the content of image files.

    Raises what that function raises, and ImportError without h5py.
    """
    h5py = optional("h5py", "hdf5", "HDF5 files")
    source = source_files(data_dir, _WHAT, HDF5_SUFFIXES, f"h5py {h5py.__version__}")
    arrays: dict[str, Any] = {}
    outside: list[TreeFile] = []
    with ExitStack() as opened:
        for file in source.files:
            path = source.root / file.path
            try:
                content = opened.enter_context(h5py.File(path))
                found = _arrays(h5py, content, path)
                arrays |= named_arrays(source, file.path, found)
                outside += [each for array in found.values() for each in _outside(array, path)]
            except FileNotFoundError:
                raise
            except (OSError, RuntimeError, KeyError) as error:
                raise ValueError(f"{path}: damaged, or no HDF5 file: {error}") from None
        changing = SourceFiles(source.root, [*source.files, *outside], source.notes)
        return arrays_dataset("hdf5", changing, arrays, image_size, ("h5py", h5py.__version__))


def _arrays(h5py: Any, content: Any, path: Path) -> dict[str, Any]:
    """Return the arrays of an open file by their full names, which include the groups."""
    found: dict[str, Any] = {}

    def visit(name: str, member: Any) -> None:
        if isinstance(member, h5py.Dataset) and member.shape:
            found[name] = _mapped(member, path)

    content.visititems(visit)
    return found


def _outside(array: Any, path: Path) -> Iterator[TreeFile]:
    """Yield the other files that hold values of an array, in all folders in which HDF5 may look for them.

    path: file of the array.
    """
    if isinstance(array, np.memmap):
        return
    names = [name for name, *_ in array.external or ()]
    if array.is_virtual:
        names += [source.file_name for source in array.virtual_sources()]
    # The sources of virtual arrays are next to the file, external files in the working directory.
    for place in dict.fromkeys(folder / name for name in names for folder in (path.parent, Path())):
        if place.is_file():
            status = place.stat()
            yield TreeFile(str(place), "", status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _mapped(array: Any, path: Path) -> Any:
    """Return an h5py array memory-mapped if it is contiguous uint8, else the array itself."""
    offset = array.id.get_offset()
    whole = array.chunks is None and array.external is None and not array.is_virtual
    if offset is None or not whole or array.dtype != np.uint8:
        return array
    return np.memmap(path, array.dtype, "r", offset, array.shape)
