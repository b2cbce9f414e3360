"""Activations made of pieces, and soft versions of them."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _where_positive(c: RuleContext, then: ir.Value, otherwise: ir.Value) -> ir.Value:
    e, x = c.emit, c.input(0)
    return e.where(e.compare("Greater", x, e.scalar(0, x)), then, otherwise)


@rule("Relu", since=6, until=14)
def relu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where y > 0, else 0"""
    e, zero = c.emit, c.emit.scalar(0, c.cotangent)
    return [lambda: e.where(e.compare("Greater", c.output, zero), c.cotangent, zero)]


@rule("LeakyRelu", since=6, until=16)
def leaky_relu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where x > 0, else α · ȳ"""
    alpha = c.attr_float("alpha", 0.01)
    return [lambda: _where_positive(c, c.cotangent, c.emit.scale(c.cotangent, alpha))]


@rule("PRelu", since=7, until=16, broadcasts=True)
def prelu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where x > 0, else ȳ · slope;  slopē = 0 where x > 0, else ȳ · x"""
    e, x, slope = c.emit, c.input(0), c.input(1)
    return [
        lambda: _where_positive(c, c.cotangent, e.mul(c.cotangent, slope)),
        lambda: _where_positive(c, e.scalar(0, x), e.mul(c.cotangent, x)),
    ]


@rule("Elu", since=6, until=22)
def elu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where x > 0, else ȳ · (y + α)"""
    e, alpha = c.emit, c.emit.scalar(c.attr_float("alpha", 1.0), c.output)
    return [lambda: _where_positive(c, c.cotangent, e.mul(c.cotangent, e.add(c.output, alpha)))]


@rule("Selu", since=6, until=22)
def selu(c: RuleContext) -> RuleResult:
    """x̄ = γ · ȳ where x > 0, else ȳ · (y + γ·α)"""
    e, y, dy = c.emit, c.output, c.cotangent
    alpha = c.attr_float("alpha", 1.67326319217681884765625)
    gamma = c.attr_float("gamma", 1.05070102214813232421875)
    return [lambda: _where_positive(c, e.scale(dy, gamma), e.mul(dy, e.add(y, e.scalar(gamma * alpha, y))))]


@rule("Celu", since=12, until=12)
def celu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where x > 0, else ȳ · (y/α + 1)"""
    e, y, alpha = c.emit, c.output, c.attr_float("alpha", 1.0)
    return [
        lambda: _where_positive(
            c, c.cotangent, e.mul(c.cotangent, e.add(e.scale(y, 1 / alpha), e.scalar(1, y)))
        )
    ]


@rule("ThresholdedRelu", since=10, until=22)
def thresholded_relu(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where x > α, else 0"""
    e, x = c.emit, c.input(0)
    alpha = e.scalar(c.attr_float("alpha", 1.0), x)
    return [lambda: e.where(e.compare("Greater", x, alpha), c.cotangent, e.scalar(0, x))]


@rule("Shrink", since=9, until=9)
def shrink(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where |x| > λ, else 0"""
    e, x = c.emit, c.input(0)
    limit = e.scalar(c.attr_float("lambd", 0.5), x)
    return [lambda: e.where(e.compare("Greater", e.unary("Abs", x), limit), c.cotangent, e.scalar(0, x))]


@rule("HardSigmoid", since=6, until=22)
def hard_sigmoid(c: RuleContext) -> RuleResult:
    """x̄ = α · ȳ where 0 < y < 1, else 0"""
    e, y = c.emit, c.output
    zero, one = e.scalar(0, y), e.scalar(1, y)

    def operand() -> ir.Value:
        inside = e.where(e.compare("Less", y, one), e.scale(c.cotangent, c.attr_float("alpha", 0.2)), zero)
        return e.where(e.compare("Greater", y, zero), inside, zero)

    return [operand]


@rule("HardSwish", since=14, until=22)
def hard_swish(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (x/3 + 1/2) where −3 < x < 3, ȳ above, 0 below"""
    e, x, dy = c.emit, c.input(0), c.cotangent

    def operand() -> ir.Value:
        ramp = e.mul(dy, e.add(e.scale(x, 1 / 3), e.scalar(0.5, x)))
        below = e.where(e.compare("Greater", x, e.scalar(-3, x)), ramp, e.scalar(0, x))
        return e.where(e.compare("Less", x, e.scalar(3, x)), below, dy)

    return [operand]


@rule("Softplus", since=1, until=22)
def softplus(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · σ(x)"""
    return [lambda: c.emit.mul(c.cotangent, c.emit.unary("Sigmoid", c.input(0)))]


@rule("Softsign", since=1, until=22)
def softsign(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (1 − |y|)²"""
    e, y = c.emit, c.output

    def operand() -> ir.Value:
        rest = e.sub(e.scalar(1, y), e.unary("Abs", y))
        return e.mul(c.cotangent, e.mul(rest, rest))

    return [operand]


@rule("Mish", since=18, until=22)
def mish(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (t + x · σ(x) · (1 − t²)), t = tanh(log(1 + exp x))"""
    e, x = c.emit, c.input(0)

    def operand() -> ir.Value:
        t = e.unary("Tanh", e.unary("Softplus", x))
        slope = e.mul(e.mul(x, e.unary("Sigmoid", x)), e.sub(e.scalar(1, x), e.mul(t, t)))
        return e.mul(c.cotangent, e.add(t, slope))

    return [operand]
