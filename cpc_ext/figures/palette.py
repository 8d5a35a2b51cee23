"""The colours that figures share."""

from __future__ import annotations

__all__ = ["BLUE", "GRAY", "GREEN", "LINES", "RED"]

BLUE, GRAY, GREEN, RED = "#1f5fa8", "#8a8a8a", "#2e8b57", "#c0392b"
# The colours of lines in one figure, by number.
LINES = (BLUE, GREEN, RED, "#8e5ea2", "#d08a1d", "#4a4a4a")
