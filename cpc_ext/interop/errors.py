"""What is raised for checkpoints that cannot be taken over."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not of the program it was said to be of; the message says why."""
