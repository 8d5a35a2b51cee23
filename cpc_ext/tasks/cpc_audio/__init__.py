"""CPC on speech: van den Oord et al. 2018, arXiv 1807.03748, section 3.1; Rivière et al. 2020, arXiv 2002.02848."""
