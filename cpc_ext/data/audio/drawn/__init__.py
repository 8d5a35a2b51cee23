"""Data sets of sound generated from a seed, one in each module: ``load(*, seed, utterances)``."""
