"""Normalization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    yield from _channels()


def _batch_norm(x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    return torch.nn.functional.batch_norm(x, mean, variance, scale, bias, eps=1e-3)


def _mean_variance(x: Any, axes: tuple[int, ...]) -> Any:
    centred = x - x.mean(axes, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(axes, keepdim=True))


def _channels() -> Iterator[Case]:
    f = torch.nn.functional
    for shape in ((2, 4, 3), (1, 4, 2, 3), (2, 4, 1, 2, 2)):
        x, scale, bias = normal(*shape), positive(4, seed=1), normal(4, seed=2)
        mean, variance = normal(4, seed=3), positive(4, seed=4)
        epsilon = {"epsilon": 1e-3}
        symbolic = (0, *range(2, len(shape)))
        common: dict[str, Any] = {"tolerance": 5e-5, "tolerance64": 1e-7, "symbolic_axes": symbolic}
        yield Case(
            "InstanceNormalization",
            (x, scale, bias),
            lambda x, s, b: f.instance_norm(x, weight=s, bias=b, eps=1e-3),
            epsilon,
            static_inputs=(1, 2),
            **common,
        )
        for groups in (1, 2, 4):
            yield Case(
                "GroupNormalization",
                (x, scale, bias),
                lambda x, s, b, g=groups: f.group_norm(x, g, s, b, eps=1e-3),
                {"num_groups": groups, **epsilon},
                static_inputs=(1, 2),
                **common,
            )
        yield Case(
            "BatchNormalization",
            (x, scale, bias, mean, variance),
            _batch_norm,
            epsilon,
            wrt=(0, 1, 2),
            static_inputs=(1, 2, 3, 4),
            **common,
        )
    for shape, axis in (((3,), 0), ((2, 3), -1), ((2, 3, 2), 1)):
        for p in (1, 2):
            yield Case(
                "LpNormalization",
                (normal(*shape),),
                lambda x, a=axis, p=p: f.normalize(x, p=p, dim=a),
                {"axis": axis, "p": p},
            )
    for shape, axes in (((2, 3, 2, 2), (0, 2, 3)), ((3, 4), (1,)), ((2, 3, 2), (0, -1))):
        yield Case(
            "MeanVarianceNormalization",
            (normal(*shape),),
            lambda x, a=axes: _mean_variance(x, a),
            {"axes": list(axes)},
            tolerance=1e-4,
            tolerance64=1e-6,
        )
