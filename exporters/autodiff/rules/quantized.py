"""Products with frozen, block-quantized weights."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

from ..context import RuleContext
from ..registry import MICROSOFT, RULES, RuleResult

rule = RULES.rule


def _matmul_nbits_refusal(node: ir.Node) -> str | None:
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    size = node.attributes["K"].as_int()
    block = node.attributes["block_size"].as_int()
    if bits not in (4, 8):
        return f"only 4 and 8 bits are supported, got {bits}"
    if size % block:
        return f"K={size} is not a multiple of block_size={block}"
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return "it has zero points; only symmetric quantization is supported"
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return "it has a group index (g_idx); only blocks of consecutive columns are supported"
    packed = node.inputs[1]
    if packed is None or packed.const_value is None:
        return "its packed weight is not an initializer"
    return None


@rule("MatMulNBits", domain=MICROSOFT, differentiable=(0,), refuses=_matmul_nbits_refusal)
def matmul_nbits(c: RuleContext) -> RuleResult:
    """ā = ȳ w, where w `[N, K]` is the packed weight, whose bytes are read again by DequantizeLinear"""
    e = c.emit
    bits, block = c.attr_int("bits", 4), c.attr_int("block_size", 0)
    columns, rows = c.attr_int("N", 0), c.attr_int("K", 0)
    scales, dtype = c.input(2), e.dtype(c.input(2))

    def operand() -> ir.Value:
        quantized = _unpacked(c, c.input(1), bits, columns, rows)
        blocks = rows // block
        # scales may be flat, [N · K / block_size]
        grid = scales
        if e.rank(scales) == 1:
            grid = e.op(
                "Reshape", scales, e.int64([columns, blocks]), dtype=dtype, shape=ir.Shape([columns, blocks])
            )
        zero_points = e.constant(np.full([columns, blocks], 1 << (bits - 1)), e.dtype(quantized))
        weight = e.op(
            "DequantizeLinear",
            quantized,
            grid,
            zero_points,
            dtype=dtype,
            shape=ir.Shape([columns, rows]),
            axis=1,
            block_size=block,
        )
        return e.matmul(c.cotangent, weight)

    return [operand]


def _unpacked(c: RuleContext, packed: ir.Value, bits: int, columns: int, rows: int) -> ir.Value:
    """The bytes of a packed weight as an initializer of `[N, K]` integers; nothing is copied."""
    tensor = packed.const_value
    if tensor is None:
        raise ExportError(f"the packed weight {packed.name!r} is not an initializer")
    if tensor.nbytes * 8 != columns * rows * bits:
        raise ExportError(
            f"the packed weight {packed.name!r} has {tensor.nbytes} bytes, expected "
            f"{columns} × {rows} × {bits} / 8 = {math.ceil(columns * rows * bits / 8)} bytes"
        )
    dtype = ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
    return c.emit.reinterpreted(packed, dtype, [columns, rows])


RULES.refuse(
    "GatherBlockQuantized",
    domain=MICROSOFT,
    because="its data and scales are frozen and its indices are integers",
)
RULES.refuse("DequantizeLinear", because="quantized weights and their scales are frozen")
