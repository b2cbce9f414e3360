"""Reductions. Opset 18 and later: the axes are an input."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult
from ..shapes import normalize_axes

rule = RULES.rule


class _Reduction:
    """A reduction node: its axes, and its values in a shape that broadcasts against its input."""

    def __init__(self, c: RuleContext) -> None:
        self.c = c
        self.x = c.input(0)
        self.keepdims = bool(c.attr_int("keepdims", 1))
        self.operand = c.optional_input(1)
        self.axes: tuple[int, ...] | None = None
        rank = c.emit.rank(self.x)
        constant = c.emit.constant_of(self.operand)
        if self.operand is None or (constant is not None and constant.size == 0):
            self.axes = () if c.attr_int("noop_with_empty_axes", 0) else tuple(range(rank))
        elif constant is not None:
            self.axes = normalize_axes([int(axis) for axis in constant.ravel()], rank)

    def spread(self, value: ir.Value) -> ir.Value:
        """`value`, of the output's shape, with the reduced axes put back at size 1."""
        e = self.c.emit
        if self.keepdims or e.rank(value) == e.rank(self.x):
            return value
        if self.axes is not None:
            # A scalar broadcasts as it is.
            return value if e.rank(value) == 0 else e.unsqueeze(value, self.axes)
        shape = ir.Shape([None] * e.rank(self.x))
        return e.op("Unsqueeze", value, self.operand, dtype=value.dtype, shape=shape)

    def collapse(self, op_type: str, value: ir.Value) -> ir.Value:
        """Another reduction over the same axes of a value of the input's shape, keeping them at size 1."""
        e = self.c.emit
        if self.axes is not None:
            return e.reduce(op_type, value, self.axes, keepdims=True)
        shape = ir.Shape([None] * e.rank(self.x))
        return e.op(op_type, value, self.operand, dtype=value.dtype, shape=shape, keepdims=1)

    def count(self, like: ir.Value) -> ir.Value:
        """The number of elements that each output element reduces, as a scalar of the type of `like`."""
        e = self.c.emit
        if self.axes is not None:
            return e.cast(e.element_count(self.x, self.axes), e.dtype(like))
        assert self.operand is not None
        sizes = e.op(
            "Gather", e.shape_of(self.x), self.operand, dtype=ir.DataType.INT64, shape=ir.Shape([None])
        )
        count = e.op("ReduceProd", sizes, dtype=ir.DataType.INT64, shape=ir.Shape([]), keepdims=0)
        # No axes are all of them, and the product of no sizes is 1.
        number, every = (
            e.op("Size", value, dtype=ir.DataType.INT64, shape=ir.Shape([]))
            for value in (self.operand, self.x)
        )
        count = e.where(e.compare("Equal", number, e.int64(0)), every, count)
        return e.cast(count, e.dtype(like))


def _dynamic_axes_refusal(node: ir.Node) -> str | None:
    noop = node.attributes.get("noop_with_empty_axes")
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if (
        noop is not None
        and noop.as_int()
        and axes is not None
        and ir.convenience.get_const_tensor(axes) is None
    ):
        return "its axes are computed at run time and may be empty: make them constant"
    return None


@rule("ReduceSum", since=13, until=13, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_sum(c: RuleContext) -> RuleResult:
    """x̄ = ȳ, repeated along the reduced axes"""
    r = _Reduction(c)
    return [lambda: c.emit.expand_like(r.spread(c.cotangent), r.x)]


@rule("ReduceMean", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_mean(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / n, repeated along the reduced axes of n elements"""
    r = _Reduction(c)
    return [lambda: c.emit.expand_like(r.spread(c.emit.div(c.cotangent, r.count(c.cotangent))), r.x)]


@rule("ReduceSumSquare", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_sum_square(c: RuleContext) -> RuleResult:
    """x̄ = 2 ȳ · x"""
    r = _Reduction(c)
    return [lambda: c.emit.mul(c.emit.scale(r.spread(c.cotangent), 2), r.x)]


@rule("ReduceLogSumExp", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_log_sum_exp(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · exp(x − y), which along a single axis is ȳ · softmax(x)"""
    e, r = c.emit, _Reduction(c)

    def operand() -> ir.Value:
        if r.axes is not None and len(r.axes) == 1:
            weights = e.op("Softmax", r.x, like=r.x, axis=r.axes[0])
        else:
            weights = e.unary("Exp", e.sub(r.x, r.spread(c.output)))
        return e.mul(r.spread(c.cotangent), weights)

    return [operand]


@rule("ReduceLogSum", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_log_sum(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / exp(y), repeated along the reduced axes"""
    e, r = c.emit, _Reduction(c)
    return [lambda: e.expand_like(r.spread(e.div(c.cotangent, e.unary("Exp", c.output))), r.x)]


@rule("ReduceL1", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_l1(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · sign(x)"""
    e, r = c.emit, _Reduction(c)
    return [lambda: e.mul(r.spread(c.cotangent), e.unary("Sign", r.x))]


@rule("ReduceL2", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_l2(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · x / y, 0 where y = 0"""
    e, r, y = c.emit, _Reduction(c), c.output

    def operand() -> ir.Value:
        zero = e.scalar(0, y)
        share = e.where(e.compare("Equal", y, zero), zero, e.div(c.cotangent, y))
        return e.mul(r.spread(share), r.x)

    return [operand]


@rule("ReduceProd", since=18, until=18, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_prod(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · the product of the other elements: 0 where two are 0, right where one is"""
    e, r = c.emit, _Reduction(c)

    def operand() -> ir.Value:
        if r.axes == ():
            return c.cotangent
        zero, one = e.scalar(0, r.x), e.scalar(1, r.x)
        is_zero = e.compare("Equal", r.x, zero)
        nonzero = e.where(is_zero, one, r.x)
        zeros = e.cast(is_zero, e.dtype(r.x))
        other_zeros = e.sub(r.collapse("ReduceSum", zeros), zeros)
        others = e.div(r.collapse("ReduceProd", nonzero), nonzero)
        return e.mul(r.spread(c.cotangent), e.where(e.compare("Equal", other_zeros, zero), others, zero))

    return [operand]


def _extremum(c: RuleContext) -> RuleResult:
    e, r = c.emit, _Reduction(c)

    def operand() -> ir.Value:
        winners = e.cast(e.compare("Equal", r.x, r.spread(c.output)), e.dtype(r.x))
        if r.axes == ():
            return c.cotangent
        return e.mul(winners, e.div(r.spread(c.cotangent), r.collapse("ReduceSum", winners)))

    return [operand]


@rule("ReduceMax", since=18, until=20, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_max(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · [x = y] / number of elements equal to y"""
    return _extremum(c)


@rule("ReduceMin", since=18, until=20, differentiable=(0,), refuses=_dynamic_axes_refusal)
def reduce_min(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · [x = y] / number of elements equal to y"""
    return _extremum(c)
