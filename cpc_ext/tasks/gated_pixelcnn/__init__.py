"""Gated PixelCNN: van den Oord et al. 2016, arXiv 1606.05328."""
