"""The error for checkpoints that cannot be read or written."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not of the named program, or the program has no such model."""
