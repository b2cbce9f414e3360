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


@rule("GatherND", since=12, until=13, differentiable=(0,))
def gather_nd(c: RuleContext) -> RuleResult:
    """x̄ = zeros with each slice of ȳ added at its index tuple"""
    batch_dims = c.attr_int("batch_dims", 0)
    return [lambda: Scatter(_with_batch_coordinates(c, batch_dims), c.cotangent, None)]


def _with_batch_coordinates(c: RuleContext, batch_dims: int) -> ir.Value:
    """The index tuples with the position along each batch axis in front."""
    e, indices = c.emit, c.input(1)
    if not batch_dims:
        return indices
    rank = e.rank(indices)
    lead = e.concat([e.dim_of(indices, axis) for axis in range(rank - 1)] + [e.int64([1])], axis=0)
    shape = ir.Shape([*e.shape(indices)[:-1], 1])
    columns = []
    for axis in range(batch_dims):
        size = e.op("Squeeze", e.dim_of(indices, axis), dtype=ir.DataType.INT64, shape=ir.Shape([]))
        numbers = e.op(
            "Range",
            e.int64(0),
            size,
            e.int64(1),
            dtype=ir.DataType.INT64,
            shape=ir.Shape([e.shape(indices)[axis]]),
        )
        column = e.unsqueeze(numbers, range(1, rank - axis))
        columns.append(e.op("Expand", column, lead, dtype=ir.DataType.INT64, shape=shape))
    return e.concat([*columns, indices], axis=rank - 1)


def _overwriting_refusal(node: ir.Node) -> str | None:
    reduction = node.attributes["reduction"].as_string() if "reduction" in node.attributes else "none"
    return None if reduction in ("none", "add") else f"reduction={reduction} is not supported"


def _overwritten(c: RuleContext, scatter: Scatter) -> RuleResult:
    e, updates, adds = c.emit, c.input(2), c.attr_str("reduction", "none") == "add"

    def data() -> ir.Value:
        if adds:
            return c.cotangent
        zeros = Scatter(scatter.indices, e.zeros_like(updates), scatter.axis)
        return zeros.write_to(e, c.cotangent)

    def written() -> ir.Value:
        if scatter.axis is None:
            return e.op("GatherND", c.cotangent, scatter.indices, like=updates)
        return e.op("GatherElements", c.cotangent, scatter.indices, like=updates, axis=scatter.axis)

    return [data, None, written]


@rule("ScatterElements", since=11, until=18, differentiable=(0, 2), refuses=_overwriting_refusal)
def scatter_elements(c: RuleContext) -> RuleResult:
    """x̄ = ȳ, with zeros at the indices unless updates are added;  ū = ȳ at the indices"""
    axis = c.attr_int("axis", 0) % c.emit.rank(c.input(0))
    return _overwritten(c, Scatter(_int64(c, c.input(1)), c.input(2), axis))


@rule("ScatterND", since=11, until=18, differentiable=(0, 2), refuses=_overwriting_refusal)
def scatter_nd(c: RuleContext) -> RuleResult:
    """x̄ = ȳ, with zeros at the indices unless updates are added;  ū = ȳ at the indices"""
    return _overwritten(c, Scatter(c.input(1), c.input(2), None))


@rule("TopK", since=10, until=24, differentiable=(0,))
def top_k(c: RuleContext) -> RuleResult:
    """x̄ = zeros with ȳ added at the Indices output"""
    axis = c.attr_int("axis", -1) % c.emit.rank(c.input(0))
    return [lambda: Scatter(c.node.outputs[1], c.cotangent, axis)]


RULES.refuse(
    "GridSample",
    because="its cotangents add up at positions that the grid computes: resample at fixed places with Resize",
)
RULES.refuse("OneHot", because="its values are chosen by an integer index: use Where")
