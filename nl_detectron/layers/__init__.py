"""Pairwise functions of the non-local operation, and the blocks."""

from .affinity import (
    concatenation,
    concatenation_affinity,
    disentangled,
    disentangled_affinity,
    dot_product,
    dot_product_affinity,
    embedded_gaussian,
    embedded_gaussian_affinity,
    gaussian,
    gaussian_affinity,
)
from .global_context import GlobalContextBlock
from .nonlocal_block import (
    INSTANTIATIONS,
    NONLOCAL_BLOCK_REGISTRY,
    NORMS,
    SUBSAMPLES,
    NonLocalBlock,
    find_block_class,
    named_blocks,
)
