"""Data sets of the arrays in files of the user, one a kind of files: ``load(data_dir, *, image_size)``."""
