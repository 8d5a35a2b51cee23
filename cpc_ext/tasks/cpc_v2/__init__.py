"""CPC v2: Hénaff et al. 2019, arXiv 1905.09272."""
