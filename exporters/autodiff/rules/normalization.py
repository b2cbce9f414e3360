"""Normalization over trailing axes."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _axes(c: RuleContext) -> list[int]:
    rank = c.emit.rank(c.input(0))
    return list(range(c.attr_int("axis", -1) % rank, rank))


def _statistics(c: RuleContext, axes: list[int]) -> tuple[ir.Value, ir.Value]:
    """The mean and 1/√(variance + ε), each of size 1 along the normalized axes.

    In float32 the forward node hands them out as its optional outputs; in other types onnxruntime would give
    them in float32, so they are computed again.
    """
    e, x, node = c.emit, c.input(0), c.node
    if e.dtype(x) == ir.DataType.FLOAT:
        first_new = len(node.outputs)
        if first_new < 3:
            node.resize_outputs(3)
        shape = ir.Shape([1 if axis in axes else dim for axis, dim in enumerate(e.shape(x))])
        for output, stem in list(zip(node.outputs, ("", "Mean", "InvStdDev"), strict=True))[first_new:]:
            output.name = e.new_name(stem)
            output.dtype = ir.DataType.FLOAT
            output.shape = shape.copy()
        return node.outputs[1], node.outputs[2]
    mean = e.reduce("ReduceMean", x, axes, keepdims=True)
    centred = e.sub(x, mean)
    variance = e.reduce("ReduceMean", e.mul(centred, centred), axes, keepdims=True)
    deviation = e.unary("Sqrt", e.add(variance, e.scalar(c.attr_float("epsilon", 1e-5), x)))
    return mean, e.unary("Reciprocal", deviation)


def _layer_normalization_refusal(node: ir.Node) -> str | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its Mean or InvStdDev output is used: compute them with ReduceMean"
    return None


@rule("LayerNormalization", since=17, until=17, refuses=_layer_normalization_refusal)
def layer_normalization(c: RuleContext) -> RuleResult:
    """x̂ = (x − μ)·r, g = ȳ·w:  x̄ = r·(g − mean(g) − x̂·mean(g·x̂)),  w̄ = Σ ȳ·x̂,  b̄ = Σ ȳ"""
    e, x, dy, axes = c.emit, c.input(0), c.cotangent, _axes(c)
    weight = c.optional_input(1)

    def normalized() -> tuple[ir.Value, ir.Value]:
        mean, inverse = _statistics(c, axes)
        return e.mul(e.sub(x, mean), inverse), inverse

    def into_x() -> ir.Value:
        x_hat, inverse = normalized()
        g = dy if weight is None else e.mul(dy, weight)
        g_mean = e.reduce("ReduceMean", g, axes, keepdims=True)
        projection = e.reduce("ReduceMean", e.mul(g, x_hat), axes, keepdims=True)
        return e.mul(inverse, e.sub(e.sub(g, g_mean), e.mul(x_hat, projection)))

    def into_weight() -> ir.Value:
        return e.unbroadcast(e.mul(dy, normalized()[0]), c.input(1))

    return [into_x, into_weight, lambda: e.unbroadcast(dy, c.input(2))]


@rule("RMSNormalization", since=23, until=23)
def rms_normalization(c: RuleContext) -> RuleResult:
    """v = mean(x²) + ε, g = ȳ·w:  x̄ = (g − x·mean(g·x)/v) / √v,  w̄ = Σ ȳ·x/√v"""
    e, x, weight, dy, axes = c.emit, c.input(0), c.input(1), c.cotangent, _axes(c)
    size = e.element_count(x, axes)
    epsilon = c.attr_float("epsilon", 1e-5)

    def mean_square() -> ir.Value:
        total = e.reduce("ReduceSumSquare", x, axes, keepdims=True)
        return e.add(e.div(total, size), e.scalar(epsilon, x))

    def into_x() -> ir.Value:
        v = mean_square()
        g = e.mul(dy, weight)
        projection = e.div(e.reduce("ReduceMean", e.mul(g, x), axes, keepdims=True), v)
        return e.div(e.sub(g, e.mul(x, projection)), e.unary("Sqrt", v))

    def into_weight() -> ir.Value:
        scaled = e.div(x, e.unary("Sqrt", mean_square()))
        return e.unbroadcast(e.mul(dy, scaled), weight)

    return [into_x, into_weight]
