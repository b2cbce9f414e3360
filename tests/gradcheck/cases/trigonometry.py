"""Trigonometric and hyperbolic functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..harness import Case
from .arrays import inside
from .elementwise import SHAPES

DOMAINS = {
    "Sin": (-3.0, 3.0),
    "Cos": (-3.0, 3.0),
    "Tan": (-1.2, 1.2),
    "Asin": (-0.9, 0.9),
    "Acos": (-0.9, 0.9),
    "Atan": (-3.0, 3.0),
    "Sinh": (-2.0, 2.0),
    "Cosh": (-2.0, 2.0),
    "Asinh": (-3.0, 3.0),
    "Acosh": (1.2, 3.0),
    "Atanh": (-0.8, 0.8),
}


def cases() -> Iterator[Case]:
    for op, (low, high) in DOMAINS.items():
        for shape in SHAPES:
            yield Case(op, (inside(low, high, *shape),), getattr(torch, op.lower()), tolerance=5e-5)
