"""What static shapes prove: equality of dimensions, results of broadcasting, axes to sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

Dim = int | ir.SymbolicDim


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are known to be equal: the same number, or the same named symbol."""
    if isinstance(a, ir.SymbolicDim) and a.value is None:
        return False
    return a == b


def same_shape(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether two shapes are known to be equal in every dimension."""
    if a is None or b is None or a.rank() != b.rank():
        return False
    return all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def broadcast_dim(a: Dim, b: Dim) -> Dim:
    """The dimension that `a` and `b` broadcast to; unknown where that depends on run-time values."""
    if same_dim(a, b) or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) and isinstance(b, ir.SymbolicDim):
        return a
    if isinstance(b, int) and isinstance(a, ir.SymbolicDim):
        return b
    return ir.SymbolicDim(None)


def broadcast_shapes(*shapes: ir.Shape | None) -> ir.Shape | None:
    """The shape that several shapes broadcast to, or None when a rank is unknown."""
    result: list[Dim] = []
    for shape in shapes:
        if shape is None:
            return None
        dims: list[Dim] = list(shape)
        width = max(len(dims), len(result))
        dims = _pad(dims, width)
        result = [broadcast_dim(a, b) for a, b in zip(_pad(result, width), dims, strict=True)]
    return ir.Shape(result)


def _pad(dims: list[Dim], width: int) -> list[Dim]:
    return [*([1] * (width - len(dims))), *dims]


@dataclass(frozen=True)
class Unbroadcast:
    """How to sum a cotangent back to the shape of a primal that was broadcast.

    Attributes:
        leading: number of leading axes that the primal does not have.
        inner: axes of the cotangent along which the primal is known to have size 1 and the cotangent not.
        uncertain: whether some other axis may or may not have been broadcast, which only run time tells.
    """

    leading: int
    inner: tuple[int, ...]
    uncertain: bool


def plan_unbroadcast(cotangent: ir.Shape, primal: ir.Shape) -> Unbroadcast:
    """Compares the two shapes, aligned at their last axes."""
    leading = cotangent.rank() - primal.rank()
    inner: list[int] = []
    uncertain = False
    for axis, (out, dim) in enumerate(zip(list(cotangent)[leading:], primal, strict=True), start=leading):
        if same_dim(out, dim):
            continue
        if dim == 1:
            inner.append(axis)
        elif isinstance(dim, ir.SymbolicDim) and out != 1:
            uncertain = True
    return Unbroadcast(leading, tuple(inner), uncertain)


def normalize_axes(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Axes as sorted non-negative numbers."""
    return tuple(sorted(axis % rank for axis in axes))


def static_dims(shape: ir.Shape, axes: Sequence[int]) -> list[int] | None:
    """The sizes of some axes, or None unless all of them are static."""
    dims = [dim for dim in (shape[axis] for axis in axes) if isinstance(dim, int)]
    return dims if len(dims) == len(axes) else None


def reduced_shape(shape: ir.Shape | None, axes: Sequence[int], *, keepdims: bool) -> ir.Shape | None:
    """The shape left after reducing `axes` (non-negative)."""
    if shape is None:
        return None
    if keepdims:
        return ir.Shape([1 if axis in axes else dim for axis, dim in enumerate(shape)])
    return ir.Shape([dim for axis, dim in enumerate(shape) if axis not in axes])


def reshape_target(source: ir.Shape | None, target: ir.Shape | None) -> list[int] | None:
    """A constant shape operand that makes Reshape turn `source` into `target`, or None.

    Static dimensions stand for themselves, 0 copies the dimension at the same position. -1 (at most once) is
    avoided next to dimensions that may be 0 at run time, for which onnxruntime cannot infer it.
    """
    if source is None or target is None:
        return None
    spec: list[int] = []
    for axis, dim in enumerate(target):
        if isinstance(dim, int):
            if dim == 0:
                return None
            spec.append(dim)
        elif axis < source.rank() and same_dim(source[axis], dim):
            spec.append(0)
        else:
            spec.append(-1)
    if spec.count(-1) > 1 or (-1 in spec and 0 in spec):
        return None
    return spec
