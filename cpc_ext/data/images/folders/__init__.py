"""Data sets of the files in a folder of the user, one a module: ``load(data_dir, *, image_size)``."""
