"""Normalization."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..harness import Case
from .arrays import normal, positive


def _layer_norm(axis: int, epsilon: float):  # type: ignore[no-untyped-def]
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        axes = tuple(range(axis % x.ndim, x.ndim))
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + epsilon) * w
        return y if b is None else y + b

    return function


def _rms_norm(axis: int, epsilon: float):  # type: ignore[no-untyped-def]
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(axis % x.ndim, x.ndim))
        return x / torch.sqrt((x**2).mean(axes, keepdim=True) + epsilon) * w

    return function


def cases() -> Iterator[Case]:
    for shape, axis, epsilon in (
        ((4,), -1, 1e-5),
        ((2, 4), -1, 1e-5),
        ((2, 3, 4), -1, 1e-3),
        ((2, 3, 4), 1, 1e-5),
        ((1, 2, 1, 2, 3), 3, 1e-5),
        ((2, 0, 4), -1, 1e-5),
        ((2, 3, 4), 2, 1e-5),
    ):
        parameters = shape[axis % len(shape) :]
        attributes = {"axis": axis, "epsilon": epsilon}
        x, w, b = normal(*shape), positive(*parameters, seed=1), normal(*parameters, seed=2)
        yield Case("LayerNormalization", (x, w, b), _layer_norm(axis, epsilon), attributes, tolerance=5e-5)
        yield Case("LayerNormalization", (x, w), _layer_norm(axis, epsilon), attributes, tolerance=5e-5)
        yield Case("RMSNormalization", (x, w), _rms_norm(axis, epsilon), attributes, tolerance=5e-5)
