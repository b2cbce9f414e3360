"""Operators that rearrange, repeat, cut or join, without arithmetic."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..emitter import Emitter
from ..registry import RULES, RuleResult
from ..shapes import static_dims
from .rearrange import scatter_through

rule = RULES.rule


def _reshape_back(c: RuleContext) -> RuleResult:
    return [lambda: c.emit.reshape_like(c.cotangent, c.input(0))]


@rule("Reshape", since=5, until=25, differentiable=(0,))
def reshape(c: RuleContext) -> RuleResult:
    """x̄ = ȳ in the shape of x"""
    return _reshape_back(c)


@rule("Flatten", since=1, until=25)
def flatten(c: RuleContext) -> RuleResult:
    """x̄ = ȳ in the shape of x"""
    return _reshape_back(c)


@rule("Squeeze", since=13, until=25, differentiable=(0,))
def squeeze(c: RuleContext) -> RuleResult:
    """x̄ = ȳ with the removed axes put back"""
    axes = c.optional_input(1)
    if axes is None:
        return _reshape_back(c)
    return [lambda: c.emit.op("Unsqueeze", c.cotangent, axes, like=c.input(0))]


@rule("Unsqueeze", since=13, until=25, differentiable=(0,))
def unsqueeze(c: RuleContext) -> RuleResult:
    """x̄ = ȳ without the inserted axes"""
    return [lambda: c.emit.op("Squeeze", c.cotangent, c.input(1), like=c.input(0))]


@rule("Transpose", since=1, until=25)
def transpose(c: RuleContext) -> RuleResult:
    """x̄ = ȳ with the inverse permutation"""
    rank = c.emit.rank(c.input(0))
    permutation = c.attr_ints("perm") or tuple(reversed(range(rank)))
    inverse = [permutation.index(axis) for axis in range(rank)]
    return [lambda: c.emit.transpose(c.cotangent, inverse)]


@rule("Expand", since=8, until=13, differentiable=(0,), broadcasts=True)
def expand(c: RuleContext) -> RuleResult:
    """x̄ = ȳ summed over the repeated axes"""
    return [c.cotangent]


@rule("Concat", since=4, until=13)
def concat(c: RuleContext) -> RuleResult:
    """x̄ᵢ = the piece of ȳ that came from xᵢ"""
    e, inputs = c.emit, [c.input(i) for i in range(len(c.node.inputs))]
    axis = c.attr_int("axis", 0) % e.rank(c.output)
    wanted = [i for i in range(len(inputs)) if c.wants(i)]
    if len(inputs) == 1:
        return [c.cotangent]
    if wanted == [0] or len(wanted) > 1:
        static = static_dims(ir.Shape([e.shape(value)[axis] for value in inputs]), range(len(inputs)))
        if static is not None:
            sizes = e.int64(static)
        else:
            sizes = e.concat([e.dim_of(value, axis) for value in inputs], axis=0)
        pieces = e.ops(
            "Split", c.cotangent, sizes, outputs=[(value.dtype, value.shape) for value in inputs], axis=axis
        )
        return list(pieces)
    (position,) = wanted
    start = _offset(e, inputs[:position], axis)
    stop = _offset(e, inputs[: position + 1], axis)
    piece = e.op("Slice", c.cotangent, start, stop, e.int64([axis]), like=inputs[position])
    return [piece if i == position else None for i in range(len(inputs))]


def _offset(e: Emitter, before: list[ir.Value], axis: int) -> ir.Value:
    """The summed sizes of some values along an axis, int64 `[1]`."""
    sizes = [e.shape(value)[axis] for value in before]
    static = sum(size for size in sizes if isinstance(size, int))
    total = e.int64([static])
    for value, size in zip(before, sizes, strict=True):
        if not isinstance(size, int):
            total = e.add(total, e.dim_of(value, axis))
    return total


@rule("Split", since=13, until=18, differentiable=(0,))
def split(c: RuleContext) -> RuleResult:
    """x̄ = the pieces' cotangents joined, zeros where a piece has none"""
    e, axis = c.emit, c.attr_int("axis", 0) % c.emit.rank(c.input(0))

    def operand() -> ir.Value:
        parts = [
            e.zeros_like(output) if cotangent is None else cotangent
            for output, cotangent in zip(c.node.outputs, c.cotangents, strict=True)
        ]
        joined = e.concat(parts, axis)
        return e.op("Concat", *parts, like=c.input(0), axis=axis) if len(parts) > 1 else joined

    return [operand]


@rule("Slice", since=10, until=13, differentiable=(0,))
def slice_(c: RuleContext) -> RuleResult:
    """x̄ = zeros with ȳ at the places that were cut out"""
    e, x = c.emit, c.input(0)
    steps = e.constant_of(c.optional_input(4))
    strided = c.optional_input(4) is not None and (steps is None or bool((steps != 1).any()))
    return [lambda: scatter_through(c) if strided else _pad_slice(c, x)]


def _slice_axes(c: RuleContext) -> list[int] | None:
    e, rank = c.emit, c.emit.rank(c.input(0))
    axes = c.optional_input(3)
    constant = e.constant_of(axes)
    if axes is None:
        starts = e.shape(c.input(1))[0]
        return list(range(starts)) if isinstance(starts, int) else None
    return None if constant is None else [int(axis) % rank for axis in constant]


def _pad_slice(c: RuleContext, x: ir.Value) -> ir.Value:
    """Pads ȳ: before it by where the slice starts, behind it by what is left."""
    e, rank, axes = c.emit, c.emit.rank(x), _slice_axes(c)
    if axes is None:
        return scatter_through(c)
    size = e.op("Gather", e.shape_of(x), e.int64(axes), dtype=ir.DataType.INT64, shape=ir.Shape([len(axes)]))
    length = e.op(
        "Gather", e.shape_of(c.output), e.int64(axes), dtype=ir.DataType.INT64, shape=ir.Shape([len(axes)])
    )
    starts_constant = e.constant_of(c.input(1))
    sizes, lengths = static_dims(e.shape(x), axes), static_dims(e.shape(c.output), axes)
    if starts_constant is not None and sizes is not None and lengths is not None:
        starts_wrapped = [int(s) + (n if s < 0 else 0) for s, n in zip(starts_constant, sizes, strict=True)]
        before = [min(max(start, 0), n) for start, n in zip(starts_wrapped, sizes, strict=True)]
        after = [n - k - b for n, k, b in zip(sizes, lengths, before, strict=True)]
        pads = e.int64([*before, *after])
    else:
        starts = e.cast(c.input(1), ir.DataType.INT64)
        wrapped = e.where(e.compare("Less", starts, e.int64(0)), e.add(starts, size), starts)
        begin = e.binary("Min", e.binary("Max", wrapped, e.int64(0)), size)
        pads = e.concat([begin, e.sub(e.sub(size, length), begin)], axis=0)
    if axes == list(range(rank)):
        return e.op("Pad", c.cotangent, pads, like=x)
    return e.op("Pad", c.cotangent, pads, None, e.int64(axes), like=x)


# Facts about a value, not functions of its elements.
RULES.non_differentiable("ConstantOfShape", "EyeLike", "NonZero", "Shape", "Size")
RULES.refuse("Range", because="its bounds decide the size of its output")
