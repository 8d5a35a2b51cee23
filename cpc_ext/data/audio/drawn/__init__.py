"""Data sets of sound that is drawn from a seed, one a module: ``load(*, seed, utterances)``."""
