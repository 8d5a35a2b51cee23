"""SupCon: Khosla et al. 2020, arXiv 2004.11362."""
