"""Data sets of images generated from a seed, one in each module: ``load(*, size, seed)``."""
