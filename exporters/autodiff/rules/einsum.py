"""Einsum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult
from ..shapes import Dim, broadcast_dim

rule = RULES.rule

_ELLIPSIS_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class _Equation:
    """An equation with an explicit output and letters in place of `...`."""

    operands: tuple[str, ...]
    output: str


def _parse(equation: str, ranks: list[int]) -> _Equation:
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    widths = [rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=True) if "..." in term]
    widest = max(widths, default=0)

    def explicit(term: str, width: int) -> str:
        return term.replace("...", _ELLIPSIS_LETTERS[widest - width : widest])

    operands = tuple(explicit(term, rank - len(term) + 3) for term, rank in zip(terms, ranks, strict=True))
    if arrow:
        return _Equation(operands, explicit(right, widest))
    letters = "".join(operands)
    single = sorted(c for c in set(letters) if letters.count(c) == 1 and c not in _ELLIPSIS_LETTERS)
    return _Equation(operands, _ELLIPSIS_LETTERS[:widest] + "".join(single))


def _refusal(node: ir.Node) -> str | None:
    if any(value is None or value.shape is None for value in node.inputs):
        return "the rank of an operand is unknown: run shape inference"
    ranks = [value.shape.rank() for value in node.inputs if value is not None and value.shape is not None]
    equation = node.attributes["equation"].as_string()
    for term in _parse(equation, ranks).operands:
        if len(set(term)) < len(term):
            return f"the operand {term!r} of {equation!r} takes a diagonal: use a mask and a sum"
    return None


@rule("Einsum", since=12, until=12, refuses=_refusal)
def einsum(c: RuleContext) -> RuleResult:
    """x̄ᵢ = einsum of ȳ and the other operands to the indices of xᵢ, repeated along those that only xᵢ has"""
    e, inputs = c.emit, [c.input(i) for i in range(len(c.node.inputs))]
    equation = _parse(c.node.attributes["equation"].as_string(), [e.rank(x) for x in inputs])
    sizes: dict[str, Dim] = {}
    for term, value in zip(equation.operands, inputs, strict=True):
        for letter, dim in zip(term, e.shape(value), strict=True):
            sizes[letter] = broadcast_dim(sizes.get(letter, 1), dim)

    def operand(position: int) -> ir.Value:
        others = [i for i in range(len(inputs)) if i != position]
        own = equation.operands[position]
        available = set(equation.output).union(*(equation.operands[i] for i in others))
        kept = "".join(letter for letter in own if letter in available)
        terms = [equation.output, *(equation.operands[i] for i in others)]
        total = c.cotangent
        if terms != [kept]:
            shape = ir.Shape([sizes[letter] for letter in kept])
            text = f"{','.join(terms)}->{kept}"
            values = [c.cotangent, *(inputs[i] for i in others)]
            total = e.op("Einsum", *values, dtype=total.dtype, shape=shape, equation=text)
        lost = [axis for axis, letter in enumerate(own) if letter not in available]
        total = e.unsqueeze(total, lost)
        if lost:
            return e.expand_like(total, inputs[position])
        return e.unbroadcast(total, inputs[position])

    return [partial(operand, i) for i in range(len(inputs))]
