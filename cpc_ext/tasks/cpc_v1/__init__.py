"""CPC: van den Oord et al. 2018, arXiv 1807.03748."""
