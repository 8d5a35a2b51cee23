"""Data sets made of arrays in a user's files, one module for each kind of file: ``load(data_dir, *, image_size)``."""
