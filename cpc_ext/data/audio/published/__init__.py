"""Published data sets of recordings, one in each module: ``load(data_dir, *, download)``."""
