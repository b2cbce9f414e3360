"""What is refused by name, with the reason, instead of being merely unknown."""

from __future__ import annotations

import onnx_ir as ir

from ...graph import MICROSOFT
from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _training_mode_refusal(node: ir.Node) -> str | None:
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return None
    constant = ir.convenience.get_const_tensor(mode)
    if constant is not None and not constant.numpy().any():
        return None
    return "its training_mode is on: export the model in eval mode"


@rule("Dropout", since=12, until=22, differentiable=(0,), refuses=_training_mode_refusal)
def dropout(c: RuleContext) -> RuleResult:
    """x̄ = ȳ, because dropout is off"""
    return [c.cotangent]


RULES.refuse(
    "If",
    "Loop",
    "Scan",
    because="control flow has no backward graph: export with fixed branches, or unroll the loop",
)
RULES.refuse("GRU", "LSTM", "RNN", because="recurrent operators are not unrolled")
RULES.refuse(
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    because="rounding activations has zero gradient: quantize weights only",
)
RULES.refuse(
    "DynamicQuantizeMatMul",
    "QAttention",
    "QGemm",
    "MatMulIntegerToFloat",
    domain=MICROSOFT,
    because="rounding activations has zero gradient: quantize weights only",
)
RULES.refuse(
    "Attention",
    "GroupQueryAttention",
    "MultiHeadAttention",
    domain=MICROSOFT,
    because="it fuses a cache: lower it to ai.onnx::Attention first, as exporters/passes does for ONNX files",
)
RULES.refuse(
    "DecoderMaskedMultiHeadAttention",
    "EmbedLayerNormalization",
    "MoE",
    "QMoE",
    "SparseAttention",
    domain=MICROSOFT,
    because="it fuses several layers or a cache: export the model without this fusion",
)
