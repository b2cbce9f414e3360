"""The cases: one module a family of rules."""

from __future__ import annotations

from collections.abc import Iterator

from gradcheck.cases import (
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
from gradcheck.harness import Case

MODULES = (activations, attention, elementwise, indexing, matmul, normalization, quantized, reduce, shape)


def all_cases() -> Iterator[Case]:
    """Every case of every family."""
    for module in MODULES:
        yield from module.cases()
