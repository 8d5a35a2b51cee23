"""Data sets that are drawn from a seed, one a module: ``load(*, size, seed)``."""
