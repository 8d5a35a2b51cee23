"""Data sets of images, and the views of them that a model trains on."""
