"""Arithmetic, powers, selection, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..harness import Case
from .arrays import distinct, normal, positive

BROADCASTS = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((2, 3), (2, 1)),
    ((1, 3), (2, 1)),
    ((), (2, 2)),
    ((2, 1, 2), (3, 1)),
    ((2, 1, 2, 1, 2), (1, 3, 1)),
    ((2, 0), (1,)),
    ((0, 1), (1, 3)),
    ((1,), (1, 1)),
]
SHAPES: list[tuple[int, ...]] = [(), (3,), (1, 2), (2, 0, 3), (2, 1, 2, 1, 2)]


def _unary(
    op: str, function: Callable[..., Any], make: Callable[..., Any] = normal, **kw: Any
) -> Iterator[Case]:
    for shape in SHAPES:
        yield Case(op, (make(*shape),), function, **kw)


def _tied_maximum(*xs: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.broadcast_tensors(*xs)).amax(0)


def _tied_minimum(*xs: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.broadcast_tensors(*xs)).amin(0)


def cases() -> Iterator[Case]:
    for a, b in BROADCASTS:
        yield Case("Add", (normal(*a), normal(*b, seed=1)), torch.add)
        yield Case("Sub", (normal(*a), normal(*b, seed=1)), torch.sub)
        yield Case("Mul", (normal(*a), normal(*b, seed=1)), torch.mul)
        yield Case("Div", (normal(*a), positive(*b, seed=1)), torch.div)
        yield Case("Pow", (positive(*a), normal(*b, seed=1)), torch.pow)
    for a, b in BROADCASTS[:6]:
        yield Case("Max", (normal(*a), normal(*b, seed=1)), torch.maximum)
        yield Case("Min", (normal(*a), normal(*b, seed=1)), torch.minimum)
        yield Case("Sum", (normal(*a), normal(*b, seed=1), normal(1, seed=2)), lambda *xs: sum(xs))
        # onnx's reference evaluator adds the inputs into the first one.
        whole = np.broadcast_shapes(a, b)
        yield Case(
            "Mean",
            (normal(*whole), normal(*b, seed=1)),
            lambda x, y: (x + y) / 2,
            label=f"{a}".replace(",", ""),
        )
    yield Case("Max", (normal(2, 2),), lambda x: x, label="single")
    yield Case("Max", (normal(2, 3), normal(3, seed=1), normal(1, seed=2)), _tied_maximum)
    yield Case("Min", (normal(2, 3), normal(3, seed=1), normal(1, seed=2)), _tied_minimum)
    yield Case("Sum", (normal(2, 2),), lambda x: x, label="single")

    # The exponent as a constant, where a shorter formula is used.
    for exponent in (0.0, 1.0, 2.0, 3.0, 0.5, -1.5):
        yield Case(
            "Pow",
            (positive(2, 2), np.array(exponent)),
            torch.pow,
            wrt=(0,),
            constants=(1,),
            label=f"exponent{exponent}",
        )
    yield Case("Pow", (normal(3), np.array(3.0)), torch.pow, wrt=(0,), constants=(1,), label="negative")
    yield Case("Pow", (normal(3), np.array([2, 3, 0])), torch.pow, wrt=(0,), label="integers")

    yield from _unary("Neg", torch.neg)
    yield from _unary("Abs", torch.abs, distinct)
    yield from _unary("Reciprocal", torch.reciprocal, positive)
    yield from _unary("Sqrt", torch.sqrt, positive)
    yield from _unary("Exp", torch.exp)
    yield from _unary("Log", torch.log, positive)
    yield from _unary("Erf", torch.erf)
    yield from _unary("Identity", torch.clone)
    yield Case("Cast", (normal(2, 3),), lambda x: x, {"to": 1}, label="to-float32", float64=False)
    yield Case("CastLike", (normal(2, 3), normal(1)), lambda x, _: x + 0, wrt=(0,))

    for a, b in BROADCASTS[:6]:
        yield Case("Mod", (normal(*a), positive(*b, seed=1) / 3), torch.fmod, {"fmod": 1})
    yield Case("Dropout", (normal(2, 3),), lambda x: x + 0)
    yield Case(
        "Dropout", (normal(3), np.array(0.5), np.array(False)), lambda x, *_: x + 0, wrt=(0,), constants=(2,)
    )

    condition = np.array([[True, False, True], [False, False, True]])
    for a, b in (((2, 3), (2, 3)), ((3,), (2, 1)), ((), (1, 3)), ((2, 2, 3), ())):
        yield Case("Where", (condition, normal(*a), normal(*b, seed=1)), torch.where)
    yield Case("Where", (np.array(True), normal(2), normal(2, seed=1)), torch.where)
    for low, high in ((-0.5, 0.5), (None, 0.2), (-0.2, None), (None, None)):
        yield Case(
            "Clip",
            (distinct(2, 4), *(None if b is None else np.array(b) for b in (low, high))),
            lambda x, lo=None, hi=None: x.clone() if lo is None and hi is None else torch.clamp(x, lo, hi),
            wrt=(0,),
            label=f"{low}to{high}",
        )
