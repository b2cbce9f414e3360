"""Normalization over trailing axes."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _axes(c: RuleContext) -> list[int]:
    rank = c.emit.rank(c.input(0))
    return list(range(c.attr_int("axis", -1) % rank, rank))


def _extra_output(c: RuleContext, index: int, stem: str) -> ir.Value:
    """An optional output of the forward node, float32 and of size 1 along the normalized axes."""
    node, axes = c.node, _axes(c)
    if len(node.outputs) <= index:
        node.resize_outputs(index + 1)
    output = node.outputs[index]
    if output.name is None:
        output.name = c.emit.new_name(stem)
        output.dtype = ir.DataType.FLOAT
        output.shape = ir.Shape(
            [1 if axis in axes else dim for axis, dim in enumerate(c.emit.shape(c.input(0)))]
        )
    return output


def _statistics(c: RuleContext, axes: list[int]) -> tuple[ir.Value, ir.Value]:
    """The mean and 1/√(variance + ε), each of size 1 along the normalized axes.

    In float32 the forward node hands them out as its optional outputs; in other types onnxruntime would give
    them in float32, so they are computed again.
    """
    e, x = c.emit, c.input(0)
    if e.dtype(x) == ir.DataType.FLOAT:
        return _extra_output(c, 1, "Mean"), _extra_output(c, 2, "InvStdDev")
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
    """r = 1/√(mean(x²) + ε), x̂ = x·r:  x̄ = r·(ȳ·w − x̂·mean(ȳ·y)),  w̄ = Σ ȳ·x̂"""
    if c.emit.dtype(c.input(0)) != ir.DataType.FLOAT:
        return _rms_cotangents(c, _inverse_rms(c))
    # onnxruntime runs both operators with the same kernel; only this one hands out r.
    c.node.op_type = "SimplifiedLayerNormalization"
    return _rms_cotangents(c, _extra_output(c, 1, "InvStdDev"))


def _simplified_refusal(node: ir.Node) -> str | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its InvStdDev output is used: compute it with ReduceMean"
    return None


@rule("SimplifiedLayerNormalization", refuses=_simplified_refusal)
def simplified_layer_normalization(c: RuleContext) -> RuleResult:
    """onnxruntime's RMSNormalization, r = InvStdDev, x̂ = x·r:  x̄ = r·(ȳ·w − x̂·mean(ȳ·y)),  w̄ = Σ ȳ·x̂"""
    return _rms_cotangents(c, _extra_output(c, 1, "InvStdDev"))


def _inverse_rms(c: RuleContext) -> ir.Value:
    e, x, axes = c.emit, c.input(0), _axes(c)
    mean_square = e.reduce("ReduceMean", e.mul(x, x), axes, keepdims=True)
    root = e.unary("Sqrt", e.add(mean_square, e.scalar(c.attr_float("epsilon", 1e-5), x)))
    return e.unary("Reciprocal", root)


def _rms_cotangents(c: RuleContext, inverse: ir.Value) -> RuleResult:
    e, x, weight, dy, axes = c.emit, c.input(0), c.input(1), c.cotangent, _axes(c)

    def into_x() -> ir.Value:
        projection = e.reduce("ReduceMean", e.mul(dy, c.output), axes, keepdims=True)
        # x̂ is written out, so that the products with numbers of one per row come first.
        return e.mul(inverse, e.sub(e.mul(dy, weight), e.mul(x, e.mul(inverse, projection))))

    return [into_x, lambda: e.unbroadcast(e.mul(dy, e.mul(x, inverse)), weight)]
