"""Softmax and its logarithm."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _is_replaced(y: ir.Value) -> bool:
    """Whether the graph looks for rows of `y` that are no numbers, or chooses between `y` and something."""
    readers = [use.node for use in y.uses()]
    if any(node.op_type in ("IsNaN", "Where") for node in readers):
        return True
    return any(_is_replaced(node.outputs[0]) for node in readers if node.op_type in ("Cast", "CastLike"))


@rule("Softmax", since=13, until=13)
def softmax(c: RuleContext) -> RuleResult:
    """x̄ = y · (ȳ − Σ ȳ·y), summed along the axis; 0 where y is no number and the graph replaces it"""
    e, y, axis = c.emit, c.output, c.attr_int("axis", -1)
    if _is_replaced(y):
        # In a row that is masked throughout: its cotangent is 0, but 0 times no number is none either.
        missing = e.op("IsNaN", y, dtype=ir.DataType.BOOL, shape=y.shape)
        y = e.where(missing, e.scalar(0, y), y)
    return [lambda: e.mul(y, e.sub(c.cotangent, e.sum(e.mul(c.cotangent, y), [axis])))]


@rule("LogSoftmax", since=13, until=13)
def log_softmax(c: RuleContext) -> RuleResult:
    """x̄ = ȳ − exp(y) · Σ ȳ, summed along the axis"""
    e, axis = c.emit, c.attr_int("axis", -1)
    return [
        lambda: e.sub(c.cotangent, e.mul(e.unary("Exp", c.output), e.sum(c.cotangent, [axis]))),
    ]
