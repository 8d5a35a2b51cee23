"""Greedy InfoMax: Löwe et al. 2019, arXiv 1905.11786."""
