"""Trigonometric and hyperbolic functions."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _square(c: RuleContext, value: ir.Value) -> ir.Value:
    return c.emit.mul(value, value)


@rule("Sin", since=7, until=22)
def sin(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · cos x"""
    return [lambda: c.emit.mul(c.cotangent, c.emit.unary("Cos", c.input(0)))]


@rule("Cos", since=7, until=22)
def cos(c: RuleContext) -> RuleResult:
    """x̄ = −ȳ · sin x"""
    return [lambda: c.emit.mul(c.emit.neg(c.cotangent), c.emit.unary("Sin", c.input(0)))]


@rule("Tan", since=7, until=22)
def tan(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (1 + y²)"""
    e, y = c.emit, c.output
    return [lambda: e.mul(c.cotangent, e.add(e.scalar(1, y), _square(c, y)))]


@rule("Asin", since=7, until=22)
def asin(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / √(1 − x²)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.div(c.cotangent, e.unary("Sqrt", e.sub(e.scalar(1, x), _square(c, x))))]


@rule("Acos", since=7, until=22)
def acos(c: RuleContext) -> RuleResult:
    """x̄ = −ȳ / √(1 − x²)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.div(e.neg(c.cotangent), e.unary("Sqrt", e.sub(e.scalar(1, x), _square(c, x))))]


@rule("Atan", since=7, until=22)
def atan(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / (1 + x²)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.div(c.cotangent, e.add(e.scalar(1, x), _square(c, x)))]


@rule("Sinh", since=9, until=22)
def sinh(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · cosh x"""
    return [lambda: c.emit.mul(c.cotangent, c.emit.unary("Cosh", c.input(0)))]


@rule("Cosh", since=9, until=22)
def cosh(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · sinh x"""
    return [lambda: c.emit.mul(c.cotangent, c.emit.unary("Sinh", c.input(0)))]


@rule("Asinh", since=9, until=22)
def asinh(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / √(x² + 1)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.div(c.cotangent, e.unary("Sqrt", e.add(_square(c, x), e.scalar(1, x))))]


@rule("Acosh", since=9, until=22)
def acosh(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / √(x² − 1)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.div(c.cotangent, e.unary("Sqrt", e.sub(_square(c, x), e.scalar(1, x))))]


@rule("Atanh", since=9, until=22)
def atanh(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / (1 − x²)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.div(c.cotangent, e.sub(e.scalar(1, x), _square(c, x)))]
