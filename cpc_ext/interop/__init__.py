"""Checkpoints of the programs that cpc_ext takes over from: read as models of ours, and written again."""

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.programs import SOURCES, export_reference, load_reference, read_reference, save_reference
from cpc_ext.interop.reference import Form, Reference

__all__ = [
    "SOURCES",
    "CheckpointError",
    "Form",
    "Reference",
    "export_reference",
    "load_reference",
    "read_reference",
    "save_reference",
]
