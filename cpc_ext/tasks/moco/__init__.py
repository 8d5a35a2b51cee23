"""MoCo: He et al. 2020, arXiv 1911.05722; version 2, Chen et al. 2020, arXiv 2003.04297."""
