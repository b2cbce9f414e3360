"""Reading elements by index: the cotangent adds updates at the same indices."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult
from ..scatter import Scatter

rule = RULES.rule


@rule("Gather", since=1, until=13, differentiable=(0,))
def gather(c: RuleContext) -> RuleResult:
    """x̄ = zeros with each slice of ȳ added at its index"""
    e, x, indices = c.emit, c.input(0), _int64(c, c.input(1))
    rank, index_rank = e.rank(x), e.rank(indices)
    axis = c.attr_int("axis", 0) % rank

    def operand() -> Scatter:
        if axis == 0:
            return Scatter(e.unsqueeze(indices, [index_rank]), c.cotangent, None)
        # ScatterElements wants one index per update: the indices become one axis and repeat along the others.
        updates = c.cotangent
        if index_rank == 0:
            updates = e.unsqueeze(updates, [axis])
        elif index_rank > 1:
            target = e.concat([e.dim_of(x, i) if i != axis else e.int64([-1]) for i in range(rank)], axis=0)
            flat_dims = [None if i == axis else dim for i, dim in enumerate(e.shape(x))]
            updates = e.op("Reshape", updates, target, dtype=x.dtype, shape=ir.Shape(flat_dims))
        column = e.int64([-1] + [1] * (rank - axis - 1))
        aligned = e.op(
            "Reshape",
            indices,
            column,
            dtype=ir.DataType.INT64,
            shape=ir.Shape([None] + [1] * (rank - axis - 1)),
        )
        repeated = e.op("Expand", aligned, e.shape_of(updates), dtype=ir.DataType.INT64, shape=updates.shape)
        return Scatter(repeated, updates, axis)

    return [operand]


def _int64(c: RuleContext, indices: ir.Value) -> ir.Value:
    """Indices as int64, which the scatter operators want."""
    return c.emit.cast(indices, ir.DataType.INT64)


@rule("GatherElements", since=11, until=13, differentiable=(0,))
def gather_elements(c: RuleContext) -> RuleResult:
    """x̄ = zeros with each element of ȳ added at its index along the axis"""
    axis = c.attr_int("axis", 0) % c.emit.rank(c.input(0))
    return [lambda: Scatter(_int64(c, c.input(1)), c.cotangent, axis)]


def _batched_refusal(node: ir.Node) -> str | None:
    batch_dims = node.attributes.get("batch_dims")
    if batch_dims is not None and batch_dims.as_int():
        return f"batch_dims={batch_dims.as_int()} is not supported, only 0"
    return None


@rule("GatherND", since=11, until=13, differentiable=(0,), refuses=_batched_refusal)
def gather_nd(c: RuleContext) -> RuleResult:
    """x̄ = zeros with each slice of ȳ added at its index tuple"""
    return [lambda: Scatter(c.input(1), c.cotangent, None)]
