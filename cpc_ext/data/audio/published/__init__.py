"""Data sets with published recordings, one a module: ``load(data_dir, *, download)``."""
