"""Data sets with published files, one a module: ``load(data_dir, *, download)``."""
