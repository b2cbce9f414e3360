"""Operators that pad, repeat, mirror, accumulate or resample along axes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult
from ..scatter import Scatter

rule = RULES.rule
INT64 = ir.DataType.INT64


def scatter_through(c: RuleContext) -> ir.Value:
    """The cotangent of an operator that only moves elements.

    The operator is applied to the elements' own positions; ȳ is added at the positions that come out.
    """
    e, x, attributes = c.emit, c.input(0), {a.name: a.value for a in c.node.attributes.values()}
    count = e.op("Size", x, dtype=INT64, shape=ir.Shape([]))
    numbers = e.op("Range", e.int64(0), count, e.int64(1), dtype=INT64, shape=ir.Shape([None]))
    positions = e.op("Reshape", numbers, e.shape_of(x), dtype=INT64, shape=x.shape, allowzero=1)
    moved = e.op(
        c.node.op_type, positions, *c.node.inputs[1:], dtype=INT64, shape=c.output.shape, **attributes
    )
    return scatter_flat(c, moved, x)


def scatter_flat(c: RuleContext, positions: ir.Value, x: ir.Value) -> ir.Value:
    """Zeros of the shape of `x` with ȳ added at these positions of the flattened tensor."""
    e, flat = c.emit, ir.Shape([None])
    indices = e.op("Reshape", positions, e.int64([-1]), dtype=INT64, shape=flat)
    updates = e.op("Reshape", c.cotangent, e.int64([-1]), dtype=x.dtype, shape=flat)
    size = e.op("Size", x, dtype=INT64, shape=ir.Shape([]))
    zeros = e.op("Expand", e.scalar(0, x), e.unsqueeze(size, [0]), dtype=x.dtype, shape=flat)
    filled = Scatter(indices, updates, axis=0).add_to(e, zeros)
    return e.op("Reshape", filled, e.shape_of(x), like=x, allowzero=1)


@rule("Pad", since=18, until=25, differentiable=(0,))
def pad(c: RuleContext) -> RuleResult:
    """constant: x̄ = ȳ padded by the negated amounts, that is cut;  else x̄ = ȳ added up where it came from"""
    e = c.emit
    if c.attr_str("mode", "constant") != "constant":
        return [lambda: scatter_through(c)]
    pads = c.input(1)
    amounts = e.constant_of(pads)

    def operand() -> ir.Value:
        negated = e.neg(pads) if amounts is None else e.int64([-int(n) for n in amounts])
        axes = c.optional_input(3)
        inputs = [negated] if axes is None else [negated, None, axes]
        return e.op("Pad", c.cotangent, *inputs, like=c.input(0))

    return [operand]


@rule("Tile", since=6, until=13, differentiable=(0,))
def tile(c: RuleContext) -> RuleResult:
    """x̄ = Σ over the copies of ȳ"""
    e, x, repeats = c.emit, c.input(0), c.input(1)
    rank = e.rank(x)

    def operand() -> ir.Value:
        if rank == 0:
            return c.cotangent
        pairs = e.op(
            "Concat",
            e.unsqueeze(repeats, [1]),
            e.unsqueeze(e.shape_of(x), [1]),
            dtype=INT64,
            shape=ir.Shape([rank, 2]),
            axis=1,
        )
        target = e.op("Reshape", pairs, e.int64([-1]), dtype=INT64, shape=ir.Shape([2 * rank]))
        dims = [dim for axis in range(rank) for dim in (None, e.shape(x)[axis])]
        copies = e.op("Reshape", c.cotangent, target, dtype=x.dtype, shape=ir.Shape(dims), allowzero=1)
        return e.sum(copies, range(0, 2 * rank, 2), keepdims=False)

    return [operand]


@rule("CumSum", since=11, until=14, differentiable=(0,))
def cum_sum(c: RuleContext) -> RuleResult:
    """x̄ = the cumulative sum of ȳ in the other direction"""
    e, reverse = c.emit, c.attr_int("reverse", 0)
    attributes: dict[str, Any] = {"reverse": 1 - reverse, "exclusive": c.attr_int("exclusive", 0)}
    return [lambda: e.op("CumSum", c.cotangent, c.input(1), like=c.input(0), **attributes)]


RULES.refuse(
    "CumProd",
    because="its gradient divides by elements that may be 0: if all are positive, use Exp of CumSum of Log",
)


@rule("Trilu", since=14, until=14, differentiable=(0,))
def trilu(c: RuleContext) -> RuleResult:
    """x̄ = the same triangle of ȳ"""
    upper = c.attr_int("upper", 1)
    return [lambda: c.emit.op("Trilu", c.cotangent, *c.node.inputs[1:], like=c.input(0), upper=upper)]


@rule("ReverseSequence", since=10, until=10, differentiable=(0,))
def reverse_sequence(c: RuleContext) -> RuleResult:
    """x̄ = ȳ reversed again"""
    axes: dict[str, Any] = {
        "batch_axis": c.attr_int("batch_axis", 1),
        "time_axis": c.attr_int("time_axis", 0),
    }
    return [lambda: c.emit.op("ReverseSequence", c.cotangent, c.input(1), like=c.input(0), **axes)]


@rule("SpaceToDepth", since=1, until=13)
def space_to_depth(c: RuleContext) -> RuleResult:
    """x̄ = ȳ with depth put back into space"""
    block = c.attr_int("blocksize", 1)
    return [lambda: c.emit.op("DepthToSpace", c.cotangent, like=c.input(0), blocksize=block)]


@rule("DepthToSpace", since=1, until=13)
def depth_to_space(c: RuleContext) -> RuleResult:
    """x̄ = ȳ with space put back into depth; in CRD order the blocks are the faster part of the index"""
    e, x, block = c.emit, c.input(0), c.attr_int("blocksize", 1)

    def operand() -> ir.Value:
        if c.attr_str("mode", "DCR") == "DCR":
            return e.op("SpaceToDepth", c.cotangent, like=x, blocksize=block)
        n, _, h, w = e.shape(x)
        channels = e.shape(c.output)[1]
        one_block = e.int64([block])
        target = e.concat(
            [e.dim_of(x, 0), e.dim_of(c.output, 1), e.dim_of(x, 2), one_block, e.dim_of(x, 3), one_block],
            axis=0,
        )
        shape = ir.Shape([n, channels, h, block, w, block])
        blocks = e.op("Reshape", c.cotangent, target, dtype=x.dtype, shape=shape, allowzero=1)
        ordered = e.transpose(blocks, [0, 1, 3, 5, 2, 4])
        return e.op("Reshape", ordered, e.shape_of(x), like=x, allowzero=1)

    return [operand]


def _resize_refusal(node: ir.Node) -> str | None:
    for name, allowed in (
        ("coordinate_transformation_mode", None),
        ("keep_aspect_ratio_policy", "stretch"),
    ):
        if name not in node.attributes:
            continue
        value = node.attributes[name].as_string()
        if value == "tf_crop_and_resize" or (allowed is not None and value != allowed):
            return f"{name}={value} is not supported"
    return None


@rule("Resize", since=18, until=19, differentiable=(0,), refuses=_resize_refusal)
def resize(c: RuleContext) -> RuleResult:
    """x̄ = ȳ times the matrix of the resampling, axis by axis; the matrix is the resampled identity"""
    e, x = c.emit, c.input(0)
    rank = e.rank(x)
    scales, sizes = c.optional_input(2), c.optional_input(3)
    axes = c.attr_ints("axes")
    listed = tuple(axis % rank for axis in axes) if axes is not None else tuple(range(rank))
    attributes = {a.name: a.value for a in c.node.attributes.values() if a.name != "axes"}

    def matrix(axis: int) -> ir.Value:
        """Row per output element, column per input element."""
        size = e.dim_of(x, axis)
        square = e.op(
            "Expand",
            e.scalar(0, x),
            e.concat([size, size], axis=0),
            dtype=x.dtype,
            shape=ir.Shape([None, None]),
        )
        identity = e.op("EyeLike", square, dtype=x.dtype, shape=square.shape)
        position = e.int64([listed.index(axis)])
        if sizes is not None:
            picked = e.op("Gather", sizes, position, dtype=INT64, shape=ir.Shape([1]))
            goal = [None, None, e.concat([picked, size], axis=0)]
        else:
            picked = e.op("Gather", scales, position, dtype=ir.DataType.FLOAT, shape=ir.Shape([1]))
            goal = [None, e.concat([picked, e.constant([1], ir.DataType.FLOAT)], axis=0)]
        dims = ir.Shape([e.shape(c.output)[axis], e.shape(x)[axis]])
        return e.op("Resize", identity, *goal, dtype=x.dtype, shape=dims, **attributes)

    def operand() -> ir.Value:
        total, letters = c.cotangent, "abcdefgh"[:rank]
        for axis in listed:
            before, after = e.shape(x)[axis], e.shape(c.output)[axis]
            if isinstance(before, int) and before == after:
                continue
            rows = letters.replace(letters[axis], "z")
            dims = [*e.shape(total)]
            dims[axis] = before
            total = e.op(
                "Einsum",
                total,
                matrix(axis),
                dtype=x.dtype,
                shape=ir.Shape(dims),
                equation=f"{rows},z{letters[axis]}->{letters}",
            )
        return total

    return [operand]
