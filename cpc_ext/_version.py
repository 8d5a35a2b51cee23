"""The version, which must be the same for the package and its compiled module."""

__version__ = "0.1.0"
