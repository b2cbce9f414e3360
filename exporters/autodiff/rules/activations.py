"""Activation functions."""

from __future__ import annotations

import math

import onnx_ir as ir

from ..context import RuleContext
from ..emitter import Emitter
from ..registry import RULES, RuleResult

rule = RULES.rule


@rule("Tanh", since=6, until=13)
def tanh(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (1 − y²)"""
    e, y = c.emit, c.output
    return [lambda: e.mul(c.cotangent, e.sub(e.scalar(1, y), e.mul(y, y)))]


@rule("Sigmoid", since=6, until=13)
def sigmoid(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · y · (1 − y)"""
    e, y = c.emit, c.output
    return [lambda: e.mul(e.mul(c.cotangent, y), e.sub(e.scalar(1, y), y))]


@rule("Swish", since=24, until=24)
def swish(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (s + α · y · (1 − s)) for y = x · s, s = σ(αx)"""
    e, x, alpha = c.emit, c.input(0), c.attr_float("alpha", 1.0)
    s = e.unary("Sigmoid", x if alpha == 1.0 else e.scale(x, alpha))
    slope = None if alpha == 1.0 else e.scalar(alpha, x)
    return [lambda: e.mul(c.cotangent, _gated_slope(e, s, c.output, slope))]


@rule("Gelu", since=20, until=20)
def gelu(c: RuleContext) -> RuleResult:
    """exact: x̄ = ȳ/2 · (1 + erf u + (2/√π) · u · exp(−u²)), u = x/√2;
    tanh: x̄ = ȳ · (s + y · (1 − s) · g′) for y = x · s, s = σ(g), g = 2√(2/π) · (x + 0.044715 x³)
    """
    e, x = c.emit, c.input(0)
    if c.attr_str("approximate", "none") == "tanh":
        return [lambda: e.mul(c.cotangent, gelu_tanh_slope(e, x, c.output))]
    return [lambda: e.mul(c.cotangent, gelu_slope(e, x))]


def gelu_slope(e: Emitter, x: ir.Value) -> ir.Value:
    """1/2 · (1 + erf u + (2/√π) · u · exp(−u²)), u = x/√2."""
    u = e.scale(x, math.sqrt(0.5))
    # The factor 2/√π goes into the exponent.
    density = e.unary("Exp", e.sub(e.scalar(math.log(2 / math.sqrt(math.pi)), x), e.mul(u, u)))
    slope = e.op("Sum", e.unary("Erf", u), e.mul(u, density), e.scalar(1, x), like=x)
    return e.scale(slope, 0.5)


def gelu_tanh_slope(e: Emitter, x: ir.Value, y: ir.Value) -> ir.Value:
    """s + y · (1 − s) · g′ for y = x · s, s = σ(g), g = 2√(2/π) · (x + 0.044715 x³)."""
    linear, cubic = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
    square = e.mul(x, x)
    s = e.unary("Sigmoid", e.mul(x, e.add(e.scale(square, cubic), e.scalar(linear, x))))
    return _gated_slope(e, s, y, e.add(e.scale(square, 3 * cubic), e.scalar(linear, x)))


def _gated_slope(e: Emitter, s: ir.Value, y: ir.Value, slope: ir.Value | None) -> ir.Value:
    """s + y · (1 − s) · slope, the derivative of y = x · s where s is a sigmoid with this slope."""
    rest = e.mul(y, e.sub(e.scalar(1, y), s))
    return e.add(s, rest if slope is None else e.mul(rest, slope))
