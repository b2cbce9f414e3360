"""The cases: one module a family of rules."""

from __future__ import annotations

from collections.abc import Iterator

from ..harness import Case
from . import (
    activations,
    attention,
    contrib,
    convolution,
    einsum,
    elementwise,
    indexing,
    matmul,
    normalization,
    quantized,
    rearrange,
    rectifiers,
    reduce,
    shape,
    trigonometry,
)

MODULES = (
    activations,
    attention,
    contrib,
    convolution,
    einsum,
    elementwise,
    indexing,
    matmul,
    normalization,
    quantized,
    rearrange,
    rectifiers,
    reduce,
    shape,
    trigonometry,
)


def all_cases() -> Iterator[Case]:
    """Every case of every family."""
    for module in MODULES:
        yield from module.cases()
