"""Greedy InfoMax on speech: Löwe et al. 2019, arXiv 1905.11786, section 4.2."""
