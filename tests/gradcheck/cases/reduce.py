"""Reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..harness import Case
from .arrays import distinct, int64, normal, positive

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(x.sum(axes, keepdim=keep)),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt((x * x).sum(axes, keepdim=keep)),
    "ReduceProd": lambda x, axes, keep: _product(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
}


MAKERS = {"ReduceMax": distinct, "ReduceMin": distinct, "ReduceL1": distinct, "ReduceLogSum": positive}


def _product(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def cases() -> Iterator[Case]:
    for op, function in FUNCTIONS.items():
        make = MAKERS.get(op, normal)

        def bound(axes: tuple[int, ...], keep: int, f: Callable[..., Any] = function) -> Callable[..., Any]:
            return lambda x, _=None: f(x, axes, bool(keep))

        for keep in (0, 1):
            attributes = {"keepdims": keep}
            for shape, axes in (
                ((3,), (0,)),
                ((2, 3), (-1,)),
                ((2, 3, 2), (0, 2)),
                ((2, 1, 2, 1, 2), (1, -1)),
            ):
                inputs = (make(*shape), int64(*axes))
                yield Case(op, inputs, bound(axes, keep), attributes, constants=(1,))
                yield Case(op, inputs, bound(axes, keep), attributes, label="axes-at-run-time")
            yield Case(op, (make(2, 3),), bound((0, 1), keep), attributes, label="all")
        if op not in ("ReduceMax", "ReduceMin", "ReduceLogSum"):
            yield Case(op, (make(0, 2), int64(1)), bound((1,), 1), constants=(1,))
        yield Case(op, (make(2, 3), np.zeros(0, np.int64)), bound((0, 1), 1), constants=(1,), label="no-axes")
    for zeros in ((0,), (0, 1), (0, 1, 2)):
        holes = normal(2, 3)
        holes[0, list(zeros)] = 0
        yield Case(
            "ReduceProd",
            (holes, int64(1)),
            lambda x, _: x.prod(1, keepdim=True),
            constants=(1,),
            label=f"zeros{len(zeros)}",
        )
    for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
        yield Case(
            op,
            (distinct(2, 3), np.zeros(0, np.int64)),
            lambda x, _: x.clone(),
            {"noop_with_empty_axes": 1},
            constants=(1,),
            label="noop",
        )
    # With constant axes onnxruntime's ExpandElimination takes the 0 in the shape for "as it was".
    yield Case("ReduceSum", (normal(2, 0, 3), int64(1)), lambda x, _: x.sum(1), {"keepdims": 0})
