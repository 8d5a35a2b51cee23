"""The version, of which the package and its compiled module must be one."""

__version__ = "0.1.0"
