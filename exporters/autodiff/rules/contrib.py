"""onnxruntime's own activations, normalizations and attention."""

from __future__ import annotations

import onnx_ir as ir

from ...graph import MICROSOFT
from ..context import RuleContext
from ..registry import RULES, RuleResult
from .activations import gelu_slope, gelu_tanh_slope

rule = RULES.rule


@rule("Gelu", domain=MICROSOFT)
def gelu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ/2 · (1 + erf u + (2/√π) · u · exp(−u²)), u = x/√2"""
    return [lambda: c.emit.mul(c.cotangent, gelu_slope(c.emit, c.input(0)))]


@rule("BiasGelu", domain=MICROSOFT, broadcasts=True)
def bias_gelu(c: RuleContext) -> RuleResult:
    """s = x + b:  x̄ = ȳ/2 · (1 + erf u + (2/√π) · u · exp(−u²)), u = s/√2;  b̄ = Σ x̄"""
    shared = c.emit.mul(c.cotangent, gelu_slope(c.emit, c.emit.add(c.input(0), c.input(1))))
    return [shared, shared]


@rule("FastGelu", domain=MICROSOFT, broadcasts=True)
def fast_gelu(c: RuleContext) -> RuleResult:
    """s = x + b:  x̄ = ȳ · (p + s · p · (1 − p) · g′), p = σ(g), g = 2√(2/π) · (s + 0.044715 s³);  b̄ = Σ x̄"""
    e, bias = c.emit, c.optional_input(1)
    x = c.input(0) if bias is None else e.add(c.input(0), bias)
    shared = e.mul(c.cotangent, gelu_tanh_slope(e, x, c.output))
    return [shared, shared]


@rule("QuickGelu", domain=MICROSOFT)
def quick_gelu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (s + α · y · (1 − s)), s = σ(αx)"""
    e, x, y, alpha = c.emit, c.input(0), c.output, c.attr_float("alpha", 1.702)

    def operand() -> ir.Value:
        s = e.unary("Sigmoid", e.scale(x, alpha))
        return e.mul(c.cotangent, e.add(s, e.scale(e.mul(y, e.sub(e.scalar(1, y), s)), alpha)))

    return [operand]


@rule("RotaryEmbedding", domain=MICROSOFT, differentiable=(0,))
def rotary_embedding(c: RuleContext) -> RuleResult:
    """x̄ = ȳ rotated back, which is a rotation with −sin"""
    e = c.emit
    attributes = {a.name: a.value for a in c.node.attributes.values()}
    return [
        lambda: e.op(
            "RotaryEmbedding",
            c.cotangent,
            c.input(1),
            c.input(2),
            e.neg(c.input(3)),
            domain=MICROSOFT,
            like=c.input(0),
            **attributes,
        )
    ]


def _unused(node: ir.Node, positions: tuple[int, ...]) -> bool:
    outputs = [node.outputs[i] for i in positions if i < len(node.outputs)]
    return not any(output.uses() or output.is_graph_output() for output in outputs)


def _skip_refusal(node: ir.Node) -> str | None:
    return None if _unused(node, (1, 2)) else "its mean or inv_std_var output is used"


def _skip_cotangents(c: RuleContext, centred: bool, bias: int, beta: int | None) -> RuleResult:
    """Of LayerNormalization (or, not centred, RMSNormalization) of input + skip + bias."""
    e, gamma, dy = c.emit, c.input(2), c.cotangents[0]
    sum_cotangent = c.cotangents[3] if len(c.cotangents) > 3 else None
    shift = c.optional_input(bias)

    def total() -> ir.Value:
        if len(c.node.outputs) > 3:
            return c.node.outputs[3]
        value = e.add(c.input(0), c.input(1))
        return value if shift is None else e.add(value, shift)

    def normalized() -> tuple[ir.Value, ir.Value]:
        s = total()
        if centred:
            s = e.sub(s, e.reduce("ReduceMean", s, [-1], keepdims=True))
        square = e.reduce("ReduceMean", e.mul(s, s), [-1], keepdims=True)
        epsilon = c.attr_float("epsilon", 1e-12 if centred else 1e-6)
        inverse = e.unary("Reciprocal", e.unary("Sqrt", e.add(square, e.scalar(epsilon, s))))
        return e.mul(s, inverse), inverse

    def into_sum() -> ir.Value | None:
        if dy is None:
            return sum_cotangent
        s_hat, inverse = normalized()
        g = e.mul(dy, gamma)
        projection = e.mul(s_hat, e.reduce("ReduceMean", e.mul(g, s_hat), [-1], keepdims=True))
        if centred:
            g = e.sub(g, e.reduce("ReduceMean", g, [-1], keepdims=True))
        grad = e.mul(inverse, e.sub(g, projection))
        return grad if sum_cotangent is None else e.add(grad, sum_cotangent)

    results: dict[int, object] = {0: into_sum, 1: into_sum, bias: into_sum}
    if dy is not None:
        results[2] = lambda: e.mul(dy, normalized()[0])
        if beta is not None:
            results[beta] = dy
    return [results.get(i) for i in range(len(c.node.inputs))]  # type: ignore[misc]


@rule("SkipLayerNormalization", domain=MICROSOFT, broadcasts=True, refuses=_skip_refusal)
def skip_layer_normalization(c: RuleContext) -> RuleResult:
    """s = x + skip + b, g = ȳ·γ:  x̄ = skip̄ = r·(g − mean(g) − ŝ·mean(g·ŝ)) + s̄,
    b̄ = Σ x̄,  γ̄ = Σ ȳ·ŝ,  β̄ = Σ ȳ
    """
    return _skip_cotangents(c, centred=True, bias=4, beta=3)


@rule("SkipSimplifiedLayerNormalization", domain=MICROSOFT, broadcasts=True, refuses=_skip_refusal)
def skip_simplified_layer_normalization(c: RuleContext) -> RuleResult:
    """s = x + skip + b, g = ȳ·γ:  x̄ = skip̄ = r·(g − ŝ·mean(g·ŝ)) + s̄,  b̄ = Σ x̄,  γ̄ = Σ ȳ·ŝ"""
    return _skip_cotangents(c, centred=False, bias=3, beta=None)
