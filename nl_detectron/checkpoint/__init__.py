"""Load checkpoints safely, audit what they contain, and save them atomically."""

from .checkpointer import AuditedCheckpointer
from .load_audit import audit
from .reading import LoadError
