"""Contrastive predictive coding for PyTorch, with its hot paths in C++ and CUDA."""

from cpc_ext._version import __version__
from cpc_ext.build_info import build_info

__all__ = ["__version__", "build_info"]
