"""Reading checkpoints of other programs as models of cpc_ext, and writing models as their checkpoints."""

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
