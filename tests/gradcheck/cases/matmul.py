"""Products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..harness import Case
from .arrays import normal


def _gemm(attributes: dict[str, Any]) -> Any:
    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        left = a.T if attributes.get("transA") else a
        right = b.T if attributes.get("transB") else b
        y = attributes.get("alpha", 1.0) * left @ right
        return y if c is None else y + attributes.get("beta", 1.0) * c

    return function


def _fused(attributes: dict[str, Any]) -> Any:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        left = a.mT if attributes.get("transA") else a
        right = b.mT if attributes.get("transB") else b
        return attributes.get("alpha", 1.0) * left @ right

    return function


def cases() -> Iterator[Case]:
    for a, b in (
        ((2, 3), (3, 2)),
        ((3,), (3,)),
        ((3,), (3, 2)),
        ((2, 3), (3,)),
        ((2, 2, 3), (3,)),
        ((3,), (2, 3, 2)),
        ((2, 2, 3), (3, 2)),
        ((2, 2, 3), (3, 4)),
        ((2, 1, 2, 3), (3, 1)),
        ((2, 3), (2, 3, 2)),
        ((2, 2, 3), (2, 3, 2)),
        ((2, 1, 2, 3), (1, 2, 3, 2)),
        ((2, 2, 3), (1, 3, 2)),
        ((1, 2, 1, 2, 2), (2, 1, 2, 2)),
        ((2, 2, 3), (3, 0)),
        ((2, 2, 0), (0, 3)),
        ((0, 2, 3), (3, 2)),
        ((0, 3), (3, 2)),
    ):
        yield Case("MatMul", (normal(*a), normal(*b, seed=1)), torch.matmul)
    for trans_a in (0, 1):
        for trans_b in (0, 1):
            attributes: dict[str, Any] = {"transA": trans_a, "transB": trans_b}
            a = (3, 2) if trans_a else (2, 3)
            b = (4, 3) if trans_b else (3, 4)
            yield Case("Gemm", (normal(*a), normal(*b, seed=1)), _gemm(attributes), attributes)
            full = {**attributes, "alpha": 0.5, "beta": 2.0}
            yield Case("Gemm", (normal(*a), normal(*b, seed=1), normal(4, seed=2)), _gemm(full), full)
            for batch_a, batch_b, alpha in (
                ((), (), 1.0),
                ((2,), (2,), 0.5),
                ((2,), (), 0.5),
                ((1, 2), (3, 1), 1.0),
            ):
                yield Case(
                    "com.microsoft::FusedMatMul",
                    (normal(*batch_a, *a), normal(*batch_b, *b, seed=1)),
                    _fused({**attributes, "alpha": alpha}),
                    {**attributes, "alpha": alpha},
                    float64=False,
                )
    for c in ((2, 4), (1, 4), (2, 1), (1,), ()):
        yield Case("Gemm", (normal(2, 3), normal(3, 4, seed=1), normal(*c, seed=2)), _gemm({}))
    yield Case("Gemm", (normal(2, 0), normal(0, 4, seed=1), normal(4, seed=2)), _gemm({}))
