"""CPC v1."""
