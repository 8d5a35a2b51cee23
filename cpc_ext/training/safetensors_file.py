"""Reproducible safetensors files: equal tensors and metadata give equal bytes.

The library itself writes the metadata in the order of a hash table, which differs between processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

from safetensors.torch import save
from torch import Tensor

__all__ = ["write_safetensors"]

# Size of the little-endian header length at the start of the file; the header is padded to a multiple of this size.
_LENGTH_BYTES = 8


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, which must be contiguous and share no memory, with the metadata sorted by name.

    Raises OSError if writing fails.
    """
    content = memoryview(save(dict(tensors), dict(metadata)))
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(content[_LENGTH_BYTES:end]))
    header["__metadata__"] = dict(sorted(metadata.items()))
    # The tensors' offsets count from the end of the header, so the header's length may change.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    file.write(content[end:])
