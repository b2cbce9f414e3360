"""Pooling over spatial axes."""

from __future__ import annotations

import math

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult
from .convolution import Convolution, padding, spatial_list
from .rearrange import scatter_flat

rule = RULES.rule
INT64 = ir.DataType.INT64


def _max_pool_refusal(node: ir.Node) -> str | None:
    if "storage_order" in node.attributes and node.attributes["storage_order"].as_int():
        return "storage_order=1 is not supported"
    return None


@rule("MaxPool", since=8, until=22, refuses=_max_pool_refusal)
def max_pool(c: RuleContext) -> RuleResult:
    """x̄ = zeros with ȳ added at the Indices that the forward node hands out"""

    def operand() -> ir.Value:
        node = c.node
        if len(node.outputs) < 2:
            node.resize_outputs(2)
            node.outputs[1].name = c.emit.new_name("Indices")
            node.outputs[1].dtype = INT64
            node.outputs[1].shape = c.emit.shape(c.output).copy()
        return scatter_flat(c, node.outputs[1], c.input(0))

    return [operand]


def _average_refusal(node: ir.Node) -> str | None:
    if "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int():
        return "ceil_mode=1 is not supported"
    kernel = list(node.attributes["kernel_shape"].as_ints())
    if padding(node, len(kernel), kernel) is None:
        return "auto_pad=SAME needs static sizes: export with explicit pads"
    return None


class _Windows:
    """The windows of a pooling node, and the way back from them: each channel by itself."""

    def __init__(self, c: RuleContext) -> None:
        self.e, self.x = c.emit, c.input(0)
        self.kernel = list(c.attr_ints("kernel_shape") or ())
        self.count = len(self.kernel)
        zeros = [0] * self.count
        self.before, self.after = padding(c.node, self.count, self.kernel) or (zeros, zeros)
        self.strides = spatial_list(c.node, "strides", [1] * self.count)
        self.dilations = spatial_list(c.node, "dilations", [1] * self.count)
        self.geometry = Convolution(
            self.e, self.strides, self.dilations, self.kernel, self.before, self.after, 1
        )

    def ones(self) -> ir.Value:
        """A kernel `[1, 1, kernel…]` of ones."""
        shape = [1, 1, *self.kernel]
        one = self.e.scalar(1, self.x)
        return self.e.op("Expand", one, self.e.int64(shape), dtype=self.x.dtype, shape=ir.Shape(shape))

    def spread(self, value: ir.Value) -> ir.Value:
        """What every element of x gets when each window gives `value` to all of its elements."""
        spread = self.geometry.into_input(self._per_channel(value), self.ones(), self._per_channel(self.x))
        return self.e.op("Reshape", spread, self.e.shape_of(self.x), like=self.x)

    def _per_channel(self, value: ir.Value) -> ir.Value:
        """`[N, C, …]` as `[N·C, 1, …]`."""
        e = self.e
        shape = ir.Shape([None, 1, *e.shape(value)[2:]])
        single = e.int64([-1, 1, *[0] * self.count])
        return e.op("Reshape", value, single, dtype=value.dtype, shape=shape)


@rule("AveragePool", since=7, until=22, refuses=_average_refusal)
def average_pool(c: RuleContext) -> RuleResult:
    """x̄ = convᵀ(ȳ / number of elements in the window, ones), channel by channel"""
    e, x, windows = c.emit, c.input(0), _Windows(c)

    def operand() -> ir.Value:
        before, after = windows.before, windows.after
        if c.attr_int("count_include_pad", 0) or not any((*before, *after)):
            return windows.spread(e.scale(c.cotangent, 1 / math.prod(windows.kernel)))
        spatial = e.op("Shape", x, dtype=INT64, shape=ir.Shape([windows.count]), start=2)
        plane = e.op(
            "Expand",
            e.scalar(1, x),
            e.concat([e.int64([1, 1]), spatial], axis=0),
            dtype=x.dtype,
            shape=ir.Shape([1, 1, *e.shape(x)[2:]]),
        )
        attributes = windows.geometry.attributes(
            pads=[*before, *after], strides=windows.strides, dilations=windows.dilations
        )
        shape = ir.Shape([1, 1, *e.shape(c.output)[2:]])
        counted = e.op("Conv", plane, windows.ones(), dtype=x.dtype, shape=shape, **attributes)
        return windows.spread(e.div(c.cotangent, counted))

    return [operand]


@rule("LpPool", since=18, until=22, refuses=_average_refusal)
def lp_pool(c: RuleContext) -> RuleResult:
    """x̄ = sign(x) · |x|^(p−1) · convᵀ(ȳ / y^(p−1), ones), 0 in windows of zeros"""
    e, x, y, windows, p = c.emit, c.input(0), c.output, _Windows(c), c.attr_int("p", 2)

    def operand() -> ir.Value:
        if p == 1:
            return e.mul(e.unary("Sign", x), windows.spread(c.cotangent))
        zero = e.scalar(0, y)
        alive = e.compare("Greater", y, zero)
        power = e.op("Pow", e.where(alive, y, e.scalar(1, y)), e.scalar(p - 1, y), like=y)
        spread = windows.spread(e.where(alive, e.div(c.cotangent, power), zero))
        slope = (
            x
            if p == 2
            else e.mul(e.unary("Sign", x), e.op("Pow", e.unary("Abs", x), e.scalar(p - 1, x), like=x))
        )
        return e.mul(slope, spread)

    return [operand]


@rule("GlobalAveragePool", since=1, until=22)
def global_average_pool(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / n, repeated over the n positions"""
    e, x = c.emit, c.input(0)
    axes = list(range(2, e.rank(x)))
    return [lambda: e.expand_like(e.div(c.cotangent, e.element_count(x, axes)), x)]


@rule("GlobalMaxPool", since=1, until=22)
def global_max_pool(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · [x = y] / number of elements equal to y"""
    e, x = c.emit, c.input(0)

    def operand() -> ir.Value:
        winners = e.cast(e.compare("Equal", x, c.output), e.dtype(x))
        count = e.sum(winners, range(2, e.rank(x)))
        return e.mul(winners, e.div(c.cotangent, count))

    return [operand]
