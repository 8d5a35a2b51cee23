"""Data sets made of a user's folder of recordings, one in each module: ``load(data_dir)``."""
