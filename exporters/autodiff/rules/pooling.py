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


@rule("AveragePool", since=7, until=22, refuses=_average_refusal)
def average_pool(c: RuleContext) -> RuleResult:
    """x̄ = convᵀ(ȳ / number of elements in the window, ones), channel by channel"""
    e, x = c.emit, c.input(0)
    kernel = list(c.attr_ints("kernel_shape") or ())
    count = len(kernel)
    before, after = padding(c.node, count, kernel) or ([0] * count, [0] * count)
    strides = spatial_list(c.node, "strides", [1] * count)
    dilations = spatial_list(c.node, "dilations", [1] * count)
    geometry = Convolution(e, strides, dilations, kernel, before, after, 1)
    single = e.int64([-1, 1, *[0] * count])

    def per_channel(value: ir.Value) -> ir.Value:
        """`[N, C, …]` as `[N·C, 1, …]`."""
        shape = ir.Shape([None, 1, *e.shape(value)[2:]])
        return e.op("Reshape", value, single, dtype=value.dtype, shape=shape)

    def operand() -> ir.Value:
        ones = e.op(
            "Expand", e.scalar(1, x), e.int64([1, 1, *kernel]), dtype=x.dtype, shape=ir.Shape([1, 1, *kernel])
        )
        if c.attr_int("count_include_pad", 0) or not any((*before, *after)):
            share = e.scale(c.cotangent, 1 / math.prod(kernel))
        else:
            spatial = e.op("Shape", x, dtype=INT64, shape=ir.Shape([count]), start=2)
            plane_shape = ir.Shape([1, 1, *e.shape(x)[2:]])
            plane = e.op(
                "Expand",
                e.scalar(1, x),
                e.concat([e.int64([1, 1]), spatial], axis=0),
                dtype=x.dtype,
                shape=plane_shape,
            )
            attributes = geometry.attributes(pads=[*before, *after], strides=strides, dilations=dilations)
            shape = ir.Shape([1, 1, *e.shape(c.output)[2:]])
            share = e.div(c.cotangent, e.op("Conv", plane, ones, dtype=x.dtype, shape=shape, **attributes))
        spread = geometry.into_input(per_channel(share), ones, per_channel(x))
        return e.op("Reshape", spread, e.shape_of(x), like=x)

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
