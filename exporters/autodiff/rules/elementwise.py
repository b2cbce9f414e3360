"""Arithmetic, powers, exponentials, selection and clipping, element by element with broadcasting."""

from __future__ import annotations

import math
from functools import partial

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


@rule("Add", since=7, until=14, broadcasts=True)
def add(c: RuleContext) -> RuleResult:
    """ā = ȳ,  b̄ = ȳ"""
    return [c.cotangent, c.cotangent]


@rule("Sub", since=7, until=14, broadcasts=True)
def sub(c: RuleContext) -> RuleResult:
    """ā = ȳ,  b̄ = −ȳ, negated after the sum over broadcast axes, where it is smaller"""
    return [c.cotangent, lambda: c.emit.neg(c.emit.unbroadcast(c.cotangent, c.input(1)))]


@rule("Mul", since=7, until=14, broadcasts=True)
def mul(c: RuleContext) -> RuleResult:
    """ā = ȳ · b,  b̄ = ȳ · a;  where b = σ(a), ā = ȳ · (b + y · (1 − b)) for both paths"""
    e, a, b = c.emit, c.input(0), c.input(1)
    for x, gate in ((a, b), (b, a)):
        node = gate.producer()
        if node is not None and node.op_type == "Sigmoid" and node.inputs[0] is x:
            slope = e.add(gate, e.mul(c.output, e.sub(e.scalar(1, gate), gate)))
            return [e.mul(c.cotangent, slope) if value is x else None for value in (a, b)]
    return [lambda: c.emit.mul(c.cotangent, b), lambda: c.emit.mul(c.cotangent, a)]


@rule("Div", since=7, until=14, broadcasts=True)
def div(c: RuleContext) -> RuleResult:
    """ā = ȳ / b,  b̄ = −(ȳ / b) · y"""
    quotient = c.emit.div(c.cotangent, c.input(1))
    return [quotient, lambda: c.emit.neg(c.emit.unbroadcast(c.emit.mul(quotient, c.output), c.input(1)))]


@rule("Sum", since=8, until=13, broadcasts=True)
def sum_(c: RuleContext) -> RuleResult:
    """x̄ᵢ = ȳ"""
    return [c.cotangent for _ in c.node.inputs]


@rule("Mean", since=8, until=13, broadcasts=True)
def mean(c: RuleContext) -> RuleResult:
    """x̄ᵢ = ȳ / n for n inputs"""
    share = c.emit.scale(c.cotangent, 1 / len(c.node.inputs))
    return [share for _ in c.node.inputs]


@rule("Neg", since=6, until=13)
def neg(c: RuleContext) -> RuleResult:
    """x̄ = −ȳ"""
    return [lambda: c.emit.neg(c.cotangent)]


@rule("Abs", since=6, until=13)
def abs_(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · sign(x), 0 at 0"""
    return [lambda: c.emit.mul(c.cotangent, c.emit.unary("Sign", c.input(0)))]


@rule("Reciprocal", since=6, until=13)
def reciprocal(c: RuleContext) -> RuleResult:
    """x̄ = −ȳ · y²"""
    e, y = c.emit, c.output
    return [lambda: e.mul(c.cotangent, e.neg(e.mul(y, y)))]


@rule("Sqrt", since=6, until=13)
def sqrt(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / (2y)"""
    return [lambda: c.emit.div(c.emit.scale(c.cotangent, 0.5), c.output)]


@rule("Exp", since=6, until=13)
def exp(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · y"""
    return [lambda: c.emit.mul(c.cotangent, c.output)]


@rule("Log", since=6, until=13)
def log(c: RuleContext) -> RuleResult:
    """x̄ = ȳ / x"""
    return [lambda: c.emit.div(c.cotangent, c.input(0))]


@rule("Erf", since=9, until=13)
def erf(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · (2/√π) · exp(−x²)"""
    e, x = c.emit, c.input(0)
    return [lambda: e.mul(e.scale(c.cotangent, 2 / math.sqrt(math.pi)), e.unary("Exp", e.neg(e.mul(x, x))))]


@rule("Pow", since=12, until=15, broadcasts=True)
def pow_(c: RuleContext) -> RuleResult:
    """x̄ = ȳ · p · x^(p−1), 0 where p = 0;  p̄ = ȳ · y · log x, 0 where x = 0 and p ≥ 0"""
    e, x, p = c.emit, c.input(0), c.input(1)

    def base() -> ir.Value | None:
        constant = e.constant_of(p)
        if constant is not None and constant.size == 1:
            exponent = float(constant.item())
            if exponent == 0.0:
                return None
            if exponent == 1.0:
                return c.cotangent
            factor = x if exponent == 2.0 else e.binary("Pow", x, e.scalar(exponent - 1, x))
            return e.mul(e.scale(c.cotangent, exponent), factor)
        exponents = e.cast(p, e.dtype(x))
        zero, one = e.scalar(0, x), e.scalar(1, x)
        is_zero = e.compare("Equal", exponents, zero)
        # x^(p−1) may be infinite where p = 0, so the exponent is replaced before the power is taken.
        power = e.binary("Pow", x, e.where(is_zero, one, e.sub(exponents, one)))
        return e.mul(c.cotangent, e.mul(exponents, power))

    def exponent() -> ir.Value:
        zero, one = e.scalar(0, x), e.scalar(1, x)
        vanishes = e.op(
            "And",
            e.compare("Equal", x, zero),
            e.compare("GreaterOrEqual", p, e.scalar(0, p)),
            dtype=ir.DataType.BOOL,
            shape=c.output.shape,
        )
        logarithm = e.unary("Log", e.where(vanishes, one, x))
        return e.mul(e.mul(c.cotangent, c.output), logarithm)

    return [base, exponent]


def _mod_refusal(node: ir.Node) -> str | None:
    fmod = node.attributes.get("fmod")
    return None if fmod is not None and fmod.as_int() else "fmod is not set"


@rule("Mod", since=10, until=13, broadcasts=True, refuses=_mod_refusal)
def mod(c: RuleContext) -> RuleResult:
    """ā = ȳ,  b̄ = −ȳ · trunc(a/b) = −ȳ · (a − y)/b"""
    e, a, b = c.emit, c.input(0), c.input(1)
    return [c.cotangent, lambda: e.neg(e.mul(c.cotangent, e.div(e.sub(a, c.output), b)))]


@rule("Where", since=9, until=16, differentiable=(1, 2), broadcasts=True)
def where(c: RuleContext) -> RuleResult:
    """ā = ȳ where the condition holds, else 0;  b̄ = ȳ where it does not, else 0"""
    e, condition, zero = c.emit, c.input(0), c.emit.scalar(0, c.cotangent)
    return [
        None,
        lambda: e.where(condition, c.cotangent, zero),
        lambda: e.where(condition, zero, c.cotangent),
    ]


def _share_ties(c: RuleContext) -> RuleResult:
    e, y = c.emit, c.output
    winners = {
        i: e.cast(e.compare("Equal", value, y), e.dtype(y))
        for i, value in enumerate(c.node.inputs)
        if value is not None
    }
    if len(winners) == 1:
        return [c.cotangent]
    count = e.op("Sum", *winners.values(), like=y)
    share = e.div(c.cotangent, count)
    return [partial(e.mul, share, winners[i]) for i in range(len(c.node.inputs))]


@rule("Max", since=8, until=13, broadcasts=True)
def max_(c: RuleContext) -> RuleResult:
    """x̄ᵢ = ȳ · [xᵢ = y] / number of inputs equal to y"""
    return _share_ties(c)


@rule("Min", since=8, until=13, broadcasts=True)
def min_(c: RuleContext) -> RuleResult:
    """x̄ᵢ = ȳ · [xᵢ = y] / number of inputs equal to y"""
    return _share_ties(c)


@rule("Clip", since=11, until=13, differentiable=(0,))
def clip(c: RuleContext) -> RuleResult:
    """x̄ = ȳ where lo ≤ x ≤ hi, else 0"""
    e, x = c.emit, c.input(0)

    def operand() -> ir.Value:
        result = c.cotangent
        for bound, comparison in (
            (c.optional_input(1), "GreaterOrEqual"),
            (c.optional_input(2), "LessOrEqual"),
        ):
            if bound is not None:
                result = e.where(e.compare(comparison, x, bound), result, e.scalar(0, result))
        return result

    return [operand]


@rule("Cast", since=9, until=28, differentiable=(0,))
def cast(c: RuleContext) -> RuleResult:
    """x̄ = ȳ in the element type of x"""
    return [lambda: c.emit.cast(c.cotangent, c.emit.dtype(c.input(0)))]


@rule("CastLike", since=15, until=25)
def cast_like(c: RuleContext) -> RuleResult:
    """x̄ = ȳ in the element type of x; of the other input only the type is read"""
    return [lambda: c.emit.cast(c.cotangent, c.emit.dtype(c.input(0))), None]


@rule("Identity", since=1, until=25)
def identity(c: RuleContext) -> RuleResult:
    """x̄ = ȳ"""
    return [c.cotangent]


# Piecewise constant, or not real numbers: the derivative is zero wherever it exists.
RULES.non_differentiable(
    "And",
    "ArgMax",
    "ArgMin",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Ceil",
    "Equal",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "Not",
    "Or",
    "Round",
    "Sign",
    "Xor",
)
