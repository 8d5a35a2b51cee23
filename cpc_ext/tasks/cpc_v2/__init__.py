"""CPC v2."""
