"""Activations made of pieces, and soft versions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..harness import Case
from .arrays import distinct, normal
from .elementwise import SHAPES

F = torch.nn.functional

FUNCTIONS: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("Relu", torch.relu, {}),
    ("LeakyRelu", lambda x: F.leaky_relu(x, 0.2), {"alpha": 0.2}),
    ("Elu", lambda x: F.elu(x, 1.5), {"alpha": 1.5}),
    ("Selu", F.selu, {}),
    ("Celu", lambda x: F.celu(x, 1.5), {"alpha": 1.5}),
    ("ThresholdedRelu", lambda x: torch.where(x > 0.3, x, 0), {"alpha": 0.3}),
    ("Shrink", lambda x: torch.where(x.abs() > 0.3, x - 0.2 * x.sign(), 0), {"lambd": 0.3, "bias": 0.2}),
    ("HardSigmoid", lambda x: torch.clamp(0.3 * x + 0.4, 0, 1), {"alpha": 0.3, "beta": 0.4}),
    ("HardSwish", F.hardswish, {}),
    ("Softplus", F.softplus, {}),
    ("Softsign", F.softsign, {}),
    ("Mish", F.mish, {}),
]


def cases() -> Iterator[Case]:
    for op, function, attributes in FUNCTIONS:
        for shape in SHAPES:
            yield Case(op, (distinct(*shape),), function, attributes, tolerance64=1e-6)
        # Far from 0 on both sides, where the saturated pieces are.
        yield Case(op, (distinct(8) * 8,), function, attributes, tolerance64=1e-6, label="far")
    for shape, slope in (
        ((2, 3), (3,)),
        ((2, 3), (1,)),
        ((2, 3, 2), (3, 1)),
        ((2, 2), (2, 2)),
        ((0, 2), (2,)),
    ):
        yield Case(
            "PRelu",
            (distinct(*shape), normal(*slope, seed=1)),
            lambda x, s: torch.where(x > 0, x, s * x),
        )
