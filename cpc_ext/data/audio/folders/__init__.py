"""Data sets of the recordings in a folder of the user, one a module: ``load(data_dir)``."""
