"""Published data sets of images, one in each module: ``load(data_dir, *, download)``."""
