"""Activation functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..harness import Case
from .arrays import normal
from .elementwise import SHAPES


def cases() -> Iterator[Case]:
    f = torch.nn.functional
    for shape in SHAPES:
        yield Case("Tanh", (normal(*shape),), torch.tanh)
        yield Case("Sigmoid", (normal(*shape),), torch.sigmoid)
        yield Case("Gelu", (normal(*shape),), f.gelu, tolerance64=1e-7)
        yield Case(
            "Gelu",
            (normal(*shape),),
            lambda x: f.gelu(x, approximate="tanh"),
            {"approximate": "tanh"},
            tolerance64=1e-7,
        )
        yield Case("Swish", (normal(*shape),), f.silu, opset=24)
    yield Case("Swish", (normal(2, 2),), lambda x: x * torch.sigmoid(1.5 * x), {"alpha": 1.5}, opset=24)
    for shape, axis in (
        ((3,), 0),
        ((2, 3), -1),
        ((2, 3), 0),
        ((2, 3, 2), 1),
        ((1, 2, 1, 2, 3), 4),
        ((2, 0), 1),
    ):
        yield Case("Softmax", (normal(*shape),), lambda x, a=axis: torch.softmax(x, a), {"axis": axis})
        yield Case("LogSoftmax", (normal(*shape),), lambda x, a=axis: torch.log_softmax(x, a), {"axis": axis})
    yield Case("Softmax", (normal(2, 3),), lambda x: torch.softmax(x, -1), label="default-axis")
