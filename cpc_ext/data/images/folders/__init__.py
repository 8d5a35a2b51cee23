"""Data sets made of a user's folder of files, one in each module: ``load(data_dir, *, image_size)``."""
