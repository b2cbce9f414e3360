"""Emits the operators that gradient rules are made of, with the types and shapes of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ..graph import MICROSOFT
from .node_writer import NodeWriter
from .shapes import (
    broadcast_shapes,
    normalize_axes,
    plan_unbroadcast,
    reduced_shape,
    reshape_target,
    same_shape,
)


class Emitter(NodeWriter):
    """Appends operators to a graph; what is known to change nothing is not emitted."""

    # ---- arithmetic ------------------------------------------------------------------------------

    def binary(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """An elementwise operator of two broadcast inputs of one type."""
        return self.op(op_type, a, b, dtype=a.dtype, shape=broadcast_shapes(a.shape, b.shape))

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a + b."""
        return self.binary("Add", a, b)

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a − b."""
        return self.binary("Sub", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a · b; multiplying by a constant scalar 1 emits nothing."""
        for factor, other in ((a, b), (b, a)):
            if self.is_one(factor) and other.shape is not None:
                return other
        return self.binary("Mul", a, b)

    def div(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a / b."""
        return self.binary("Div", a, b)

    def scale(self, a: ir.Value, factor: float) -> ir.Value:
        """a · factor."""
        return self.mul(a, self.scalar(factor, a))

    def unary(self, op_type: str, a: ir.Value, **attributes: Any) -> ir.Value:
        """An elementwise operator of one input."""
        return self.op(op_type, a, like=a, **attributes)

    def neg(self, a: ir.Value) -> ir.Value:
        """−a."""
        return self.unary("Neg", a)

    def is_one(self, value: ir.Value) -> bool:
        """Whether a value is a constant scalar 1."""
        if value.shape is None or value.shape.rank() != 0:
            return False
        number = self.constant_of(value)
        return number is not None and bool(number == 1)

    def zeros_like(self, value: ir.Value) -> ir.Value:
        """Zeros of the type and shape of `value`."""
        return self.op("Expand", self.scalar(0, value), self.shape_of(value), like=value)

    def where(self, condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """`a` where the condition holds, else `b`."""
        shape = broadcast_shapes(condition.shape, a.shape, b.shape)
        return self.op("Where", condition, a, b, dtype=a.dtype, shape=shape)

    def compare(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """A comparison of two broadcast inputs, boolean."""
        return self.op(op_type, a, b, dtype=ir.DataType.BOOL, shape=broadcast_shapes(a.shape, b.shape))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, shape=value.shape, to=dtype.value)

    # ---- reductions ------------------------------------------------------------------------------

    def reduce(self, op_type: str, value: ir.Value, axes: Sequence[int], *, keepdims: bool) -> ir.Value:
        """A reduction over constant axes; nothing where there are none."""
        if not axes:
            return value
        axes = normalize_axes(axes, self.rank(value))
        shape = reduced_shape(value.shape, axes, keepdims=keepdims)
        return self.op(
            op_type, value, self.int64(axes), dtype=value.dtype, shape=shape, keepdims=int(keepdims)
        )

    def sum(self, value: ir.Value, axes: Sequence[int], *, keepdims: bool = True) -> ir.Value:
        """The sum over constant axes."""
        return self.reduce("ReduceSum", value, axes, keepdims=keepdims)

    def element_count(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The number of elements along some axes (non-negative), as a scalar of the type of `value`."""
        dims = [self.shape(value)[axis] for axis in axes]
        known = [dim for dim in dims if isinstance(dim, int)]
        if len(known) == len(dims):
            return self.scalar(math.prod(known), value)
        sizes = self.op(
            "Gather",
            self.shape_of(value),
            self.int64(axes),
            dtype=ir.DataType.INT64,
            shape=ir.Shape([len(axes)]),
        )
        count = self.op("ReduceProd", sizes, dtype=ir.DataType.INT64, shape=ir.Shape([]), keepdims=0)
        return self.cast(count, self.dtype(value))

    def unbroadcast(self, cotangent: ir.Value, primal: ir.Value) -> ir.Value:
        """Sums a cotangent over the axes along which its primal was broadcast.

        Nothing is emitted where static shapes prove that nothing was broadcast; where they leave it open, the
        axes are found at run time.
        """
        if same_shape(cotangent.shape, primal.shape):
            return cotangent
        plan = plan_unbroadcast(self.shape(cotangent), self.shape(primal))
        if plan.uncertain:
            return self._unbroadcast_at_run_time(cotangent, primal)
        leading = range(plan.leading)
        if not plan.leading:
            return self.sum(cotangent, plan.inner)
        total = self.sum(cotangent, [*leading, *plan.inner], keepdims=False)
        return self.unsqueeze(total, [axis - plan.leading for axis in plan.inner])

    def _unbroadcast_at_run_time(self, cotangent: ir.Value, primal: ir.Value) -> ir.Value:
        target = self.shape_of(primal)
        rank = self.rank(cotangent)
        padded = target
        if missing := rank - self.rank(primal):
            padded = self.concat([self.int64([1] * missing), target], axis=0)
        is_one = self.compare("Equal", padded, self.int64(1))
        found = self.op("NonZero", is_one, dtype=ir.DataType.INT64, shape=ir.Shape([1, None]))
        axes = self.op("Squeeze", found, self.int64([0]), dtype=ir.DataType.INT64, shape=ir.Shape([None]))
        total = self.op(
            "ReduceSum",
            cotangent,
            axes,
            dtype=cotangent.dtype,
            shape=ir.Shape([None] * rank),
            keepdims=1,
            noop_with_empty_axes=1,
        )
        return (
            self.op("Reshape", total, target, like=primal, allowzero=1)
            if missing
            else self._retyped(total, primal)
        )

    def _retyped(self, value: ir.Value, primal: ir.Value) -> ir.Value:
        value.shape = primal.shape.copy() if primal.shape is not None else None
        return value

    # ---- shapes ----------------------------------------------------------------------------------

    def reshape_like(self, value: ir.Value, primal: ir.Value) -> ir.Value:
        """`value` in the shape of `primal`."""
        if same_shape(value.shape, primal.shape):
            return value
        spec = reshape_target(value.shape, primal.shape)
        if spec is not None:
            return self.op("Reshape", value, self.int64(spec), like=primal)
        return self.op("Reshape", value, self.shape_of(primal), like=primal, allowzero=1)

    def expand_like(self, value: ir.Value, primal: ir.Value) -> ir.Value:
        """`value` broadcast to the shape of `primal`."""
        if same_shape(value.shape, primal.shape):
            return value
        return self.op("Expand", value, self.shape_of(primal), like=primal)

    def unsqueeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Inserts axes of size 1 at these positions (non-negative, of the result)."""
        if not axes:
            return value
        shape = None
        if value.shape is not None:
            dims = list(value.shape)
            for axis in sorted(axes):
                dims.insert(axis, 1)
            shape = ir.Shape(dims)
        return self.op("Unsqueeze", value, self.int64(sorted(axes)), dtype=value.dtype, shape=shape)

    def squeeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Removes axes of size 1 (non-negative)."""
        if not axes:
            return value
        shape = reduced_shape(value.shape, axes, keepdims=False)
        return self.op("Squeeze", value, self.int64(sorted(axes)), dtype=value.dtype, shape=shape)

    def transpose(self, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """Permutes the axes."""
        if list(permutation) == list(range(len(permutation))):
            return value
        shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in permutation])
        return self.op("Transpose", value, dtype=value.dtype, shape=shape, perm=list(permutation))

    def swap_last(self, value: ir.Value) -> ir.Value:
        """Transposes the last two axes."""
        rank = self.rank(value)
        return self.transpose(value, [*range(rank - 2), rank - 1, rank - 2])

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Concatenates along an axis (non-negative)."""
        if len(values) == 1:
            return values[0]
        shape = None
        if all(value.shape is not None for value in values):
            dims = list(self.shape(values[0]))
            sizes = [self.shape(value)[axis] for value in values]
            known = [size for size in sizes if isinstance(size, int)]
            dims[axis] = sum(known) if len(known) == len(sizes) else ir.SymbolicDim(None)
            shape = ir.Shape(dims)
        return self.op("Concat", *values, dtype=values[0].dtype, shape=shape, axis=axis)

    # ---- products --------------------------------------------------------------------------------

    def matmul(
        self, a: ir.Value, b: ir.Value, *, trans_a: bool = False, trans_b: bool = False, alpha: float = 1.0
    ) -> ir.Value:
        """`alpha · op(a) @ op(b)` for inputs of rank 2 or more, transposing their last two axes.

        onnxruntime's FusedMatMul does it in one node without a transposed copy; it exists for float32 only.
        """
        a_shape, b_shape = self.shape(a), self.shape(b)
        rows = a_shape[-1] if trans_a else a_shape[-2]
        columns = b_shape[-2] if trans_b else b_shape[-1]
        batch = broadcast_shapes(ir.Shape(a_shape[:-2]), ir.Shape(b_shape[:-2]))
        shape = None if batch is None else ir.Shape([*batch, rows, columns])
        plain = not trans_a and not trans_b and alpha == 1.0
        if self.dtype(a) == ir.DataType.FLOAT and not plain:
            attributes: dict[str, Any] = {}
            if trans_a:
                attributes["transA"] = 1
            if trans_b:
                attributes["transB"] = 1
            if alpha != 1.0:
                attributes["alpha"] = float(alpha)
            return self.op("FusedMatMul", a, b, domain=MICROSOFT, dtype=a.dtype, shape=shape, **attributes)
        left = self.swap_last(a) if trans_a else a
        right = self.swap_last(b) if trans_b else b
        product = self.op("MatMul", left, right, dtype=a.dtype, shape=shape)
        return product if alpha == 1.0 else self.scale(product, alpha)
