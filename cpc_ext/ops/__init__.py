"""The ops: one file each, with schema, fake kernel, autograd and the pure-PyTorch reference."""

from cpc_ext.ops.extract_patches import extract_patches

__all__ = ["extract_patches"]
