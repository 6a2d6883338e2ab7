"""Loading weights, finding out what arrived, and saving them."""

from ..files import SaveError, write_atomically
from .checkpointer import AuditedCheckpointer
from .conversion import SOURCES, convert, convert_file
from .load_audit import audit
from .reading import LoadError, read_checkpoint, read_file

__all__ = [
    "SOURCES",
    "AuditedCheckpointer",
    "LoadError",
    "SaveError",
    "audit",
    "convert",
    "convert_file",
    "read_checkpoint",
    "read_file",
    "write_atomically",
]
