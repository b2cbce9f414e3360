"""Operators in float64, for onnx's reference evaluator where its own round to float32 or do not exist.

They are written from the operators' specifications, not from the gradient rules.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]


class Erf(OpRun):
    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))),)


class Shrink(OpRun):
    op_domain = ""

    def _run(self, x: Array, bias: float = 0.0, lambd: float = 0.5) -> tuple[Array]:
        return (np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0.0)),)


class Softsign(OpRun):
    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(x / (1 + np.abs(x))),)


class GlobalMaxPool(OpRun):
    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class GroupNormalization(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        stash_type: int = 1,
    ) -> tuple[Array]:
        del stash_type
        grouped = x.reshape(x.shape[0], num_groups, -1)
        centred = grouped - grouped.mean(-1, keepdims=True)
        y = centred / np.sqrt(grouped.var(-1, keepdims=True) + epsilon)
        channels = (1, -1, *[1] * (x.ndim - 2))
        return (y.reshape(x.shape) * scale.reshape(channels) + bias.reshape(channels),)


class MeanVarianceNormalization(OpRun):
    op_domain = ""

    def _run(self, x: Array, axes: list[int] | None = None) -> tuple[Array]:
        over = tuple(axes or (0, 2, 3))
        return ((x - x.mean(over, keepdims=True)) / (x.std(over, keepdims=True) + 1e-9),)


REFERENCE_OPS = [Erf, Gelu, GlobalMaxPool, GroupNormalization, MeanVarianceNormalization, Shrink, Softsign]
