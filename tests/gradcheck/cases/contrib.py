"""onnxruntime's own activations and normalizations, built from float32 kernels only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..harness import Case
from .arrays import normal, positive
from .attention import _rotary

F = torch.nn.functional
MICROSOFT = "com.microsoft::"


def _norm(s: torch.Tensor, gamma: torch.Tensor, centred: bool) -> torch.Tensor:
    s = s - s.mean(-1, keepdim=True) if centred else s
    return s / torch.sqrt((s * s).mean(-1, keepdim=True) + 1e-5) * gamma


def cases() -> Iterator[Case]:
    common: dict[str, Any] = {"float64": False, "linear": False}
    for shape in ((3,), (2, 0), (2, 1, 4)):
        x, b = normal(*shape), normal(shape[-1], seed=1)
        yield Case(f"{MICROSOFT}Gelu", (x,), F.gelu, label="contrib", **common)
        yield Case(f"{MICROSOFT}BiasGelu", (x, b), lambda x, b: F.gelu(x + b), **common)
        yield Case(f"{MICROSOFT}FastGelu", (x,), lambda x: F.gelu(x, approximate="tanh"), **common)
        yield Case(f"{MICROSOFT}FastGelu", (x, b), lambda x, b: F.gelu(x + b, approximate="tanh"), **common)
        yield Case(f"{MICROSOFT}QuickGelu", (x,), lambda x: x * torch.sigmoid(1.702 * x), **common)
        yield Case(
            f"{MICROSOFT}QuickGelu", (x,), lambda x: x * torch.sigmoid(0.7 * x), {"alpha": 0.7}, **common
        )
    for shape in ((2, 4), (2, 3, 4)):
        x, skip = normal(*shape), normal(*shape, seed=1)
        gamma, beta, bias = positive(4, seed=2), normal(4, seed=3), normal(4, seed=4)
        common["tolerance"] = 5e-5

        def full(x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None) -> Any:
            s = x + skip + (0 if bias is None else bias)
            return _norm(s, gamma, True) + (0 if beta is None else beta)

        def simplified(x: Any, skip: Any, gamma: Any, bias: Any = None) -> Any:
            return _norm(x + skip + (0 if bias is None else bias), gamma, False)

        epsilon = {"epsilon": 1e-5}
        op = f"{MICROSOFT}SkipLayerNormalization"
        yield Case(op, (x, skip, gamma, beta, bias), full, epsilon, **common)
        yield Case(op, (x, skip, gamma, beta), full, epsilon, **common)
        yield Case(op, (x, skip, gamma), full, epsilon, **common)
        op = f"{MICROSOFT}SkipSimplifiedLayerNormalization"
        yield Case(op, (x, skip, gamma, bias), simplified, epsilon, **common)
        yield Case(op, (x, skip, gamma), simplified, epsilon, **common)
        yield Case(
            "SimplifiedLayerNormalization",
            (x, gamma),
            lambda x, g: _norm(x, g, False),
            {"axis": -1, **epsilon},
            **common,
        )
    yield from _rotary_cases()


def _rotary_cases() -> Iterator[Case]:
    angles = normal(6, 2)
    positions = np.array([[0, 2, 5], [1, 1, 3]])
    for interleaved in (0, 1):

        def function(x: Any, p: Any, cos: Any, sin: Any, i: int = interleaved) -> Any:
            return _rotary(x, cos, sin, p, heads=2, dim=0, interleaved=i)

        for shape in ((2, 2, 3, 4), (2, 3, 8)):
            yield Case(
                f"{MICROSOFT}RotaryEmbedding",
                (normal(*shape), positions, np.cos(angles), np.sin(angles)),
                function,
                {"interleaved": interleaved},
                wrt=(0,),
                float64=False,
            )
