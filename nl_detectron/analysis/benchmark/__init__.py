"""Time and memory of the operation, the block and whole models, beside their competitors.

It needs more than the package itself does: ``pip install -e .[bench]``.
"""
