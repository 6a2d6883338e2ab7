"""Loading weights, and finding out what arrived."""

from .checkpointer import AuditedCheckpointer, LoadError
from .load_audit import audit

__all__ = ["AuditedCheckpointer", "LoadError", "audit"]
