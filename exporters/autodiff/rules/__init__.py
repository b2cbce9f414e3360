"""Gradient rules, one family a file; importing the package fills the table."""

from . import (
    activations,
    attention,
    elementwise,
    indexing,
    matmul,
    normalization,
    quantized,
    reduce,
    shape,
)

__all__ = [
    "activations",
    "attention",
    "elementwise",
    "indexing",
    "matmul",
    "normalization",
    "quantized",
    "reduce",
    "shape",
]
