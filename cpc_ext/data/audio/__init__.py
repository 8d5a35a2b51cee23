"""Data sets of speech, and the windows of them that a model trains on."""
