"""Contrastive predictive coding for PyTorch, with its hot paths in C++ and CUDA."""

__version__ = "0.1.0"
