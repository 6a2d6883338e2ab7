"""Pairwise functions of the non-local operation, and the non-local block."""

from .affinity import (
    concatenation,
    concatenation_affinity,
    dot_product,
    dot_product_affinity,
    embedded_gaussian,
    embedded_gaussian_affinity,
    gaussian,
    gaussian_affinity,
)
from .nonlocal_block import INSTANTIATIONS, NORMS, SUBSAMPLES, NonLocalBlock
