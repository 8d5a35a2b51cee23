"""Files of tensors that are equal, byte for byte, where tensors and metadata are.

The library writes the metadata in the order of a hash table, another one in every process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

from safetensors.torch import save
from torch import Tensor

__all__ = ["write_safetensors"]

# The header's length, little-endian, comes first; tensors begin at a multiple of it.
_LENGTH_BYTES = 8


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, which are contiguous and share no memory, with the metadata sorted by name.

    OSError where writing fails.
    """
    content = memoryview(save(dict(tensors), dict(metadata)))
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(content[_LENGTH_BYTES:end]))
    header["__metadata__"] = dict(sorted(metadata.items()))
    # Offsets count from the end of the header, so that its length may change.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    file.write(content[end:])
