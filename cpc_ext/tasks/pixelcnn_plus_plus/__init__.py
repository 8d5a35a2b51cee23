"""PixelCNN++: Salimans et al. 2017, arXiv 1701.05517."""
