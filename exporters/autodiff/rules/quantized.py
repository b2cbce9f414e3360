"""Products with frozen, block-quantized weights: only activations and biases have cotangents."""

from __future__ import annotations

import onnx_ir as ir

from ...graph import MICROSOFT
from ...quantize.products import BIAS, MINIMUMS, ZERO_POINTS, add_to_blocks, constants_of
from ...quantize.table_weight import NF4, TABLES
from ..context import RuleContext
from ..emitter import Emitter
from ..registry import RULES, RuleResult

rule = RULES.rule
INT64 = ir.DataType.INT64


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _matmul_nbits_refusal(node: ir.Node) -> str | None:
    if _attribute(node, "bits", 4) not in (2, 4, 8):
        return f"only 2, 4 and 8 bits are supported, got {_attribute(node, 'bits', 4)}"
    if _input(node, 4) is not None:
        return "it has a group index (g_idx): quantize blocks of consecutive columns"
    zero_points = _input(node, 3)
    if zero_points is not None and zero_points.dtype != ir.DataType.UINT8:
        return f"its zero points are {zero_points.dtype}, expected packed uint8"
    if constants_of(node.inputs[1:4]) is None:
        return "its packed weight, scales or zero points are not constants"
    return None


@rule("MatMulNBits", domain=MICROSOFT, differentiable=(0, 5), refuses=_matmul_nbits_refusal)
def matmul_nbits(c: RuleContext) -> RuleResult:
    """ā = ȳ w, where w `[N, K]` is read from the same bytes by GatherBlockQuantized;  b̄ = Σ ȳ"""

    def activations() -> ir.Value:
        return c.emit.matmul(c.cotangent, _dequantized(c))

    nothing = [None] * 4
    return [activations, *nothing, lambda: c.emit.unbroadcast(c.cotangent, c.input(BIAS))]


def _dequantized(c: RuleContext) -> ir.Value:
    """The weight of a MatMulNBits node, `[N, K]`: all its rows, gathered.

    Measured for 4 bits in blocks of 32: 0.95 ns a weight on one core and half of that on two, where
    DequantizeLinear, which uses one core, takes 1.97 ns.
    """
    e, bits, block = c.emit, c.attr_int("bits", 4), c.attr_int("block_size", 0)
    rows, columns = c.attr_int("N", 0), c.attr_int("K", 0)
    blocks = -(-columns // block)
    scales = c.input(2)
    dtype = e.dtype(scales)
    inputs = [
        e.reinterpreted(c.input(1), ir.DataType.UINT8, [rows, blocks * block * bits // 8]),
        _all_rows(e, rows),
        scales if scales.const_value is None else e.reinterpreted(scales, dtype, [rows, blocks]),
    ]
    zero_points = c.optional_input(ZERO_POINTS)
    if zero_points is not None:
        packed_blocks = -(-blocks * bits // 8)
        inputs.append(e.reinterpreted(zero_points, ir.DataType.UINT8, [rows, packed_blocks]))
    weight = e.op(
        "GatherBlockQuantized",
        *inputs,
        domain=MICROSOFT,
        dtype=dtype,
        shape=ir.Shape([rows, blocks * block]),
        gather_axis=0,
        quantize_axis=1,
        bits=bits,
        block_size=block,
    )
    minimums = c.optional_input(MINIMUMS)
    if minimums is not None:
        weight = add_to_blocks(e.graph, weight, minimums, block)
    if blocks * block == columns:
        return weight
    bounds = [e.int64([0]), e.int64([columns]), e.int64([1])]
    return e.op("Slice", weight, *bounds, dtype=dtype, shape=ir.Shape([rows, columns]))


def _all_rows(e: Emitter, rows: int) -> ir.Value:
    """0, 1, … as int64 `[rows]`, made to depend on a graph input.

    With constant indices onnxruntime's constant folding would write out every weight in float32.
    """
    numbers = e.int64(list(range(rows)))
    source = next(iter(e.graph.inputs), None)
    if source is None:
        return numbers
    size = e.op("Size", source, dtype=INT64, shape=ir.Shape([]))
    nothing = e.op("Mul", size, e.int64(0), dtype=INT64, shape=ir.Shape([]))
    return e.op("Add", numbers, nothing, dtype=INT64, shape=ir.Shape([rows]))


def _codes(e: Emitter, packed: ir.Value) -> ir.Value:
    """The 4-bit codes of packed bytes, the high half first, uint8 `[bytes, 2]`."""
    byte = ir.DataType.UINT8
    flat = e.op("Reshape", packed, e.int64([-1, 1]), dtype=byte, shape=ir.Shape([None, 1]))
    shape = ir.Shape([None, 2])
    shifted = e.op("BitShift", flat, e.constant([4, 0], byte), dtype=byte, shape=shape, direction="RIGHT")
    return e.op("BitwiseAnd", shifted, e.constant(15, byte), dtype=byte, shape=shape)


def _bnb4_refusal(node: ir.Node) -> str | None:
    if _attribute(node, "training_mode", 0):
        return "its training_mode is set"
    if not _attribute(node, "transB", 1):
        return "its weight is not stored transposed (transB=0)"
    return None


@rule("MatMulBnb4", domain=MICROSOFT, differentiable=(0,), refuses=_bnb4_refusal)
def matmul_bnb4(c: RuleContext) -> RuleResult:
    """ā = ȳ w, where w `[N, K]` is looked up code by code and scaled by each block's largest value"""
    e, block = c.emit, c.attr_int("block_size", 64)
    rows, columns = c.attr_int("N", 0), c.attr_int("K", 0)
    table = TABLES[c.attr_int("quant_type", NF4)].tolist()

    def activations() -> ir.Value:
        largest = c.input(2)
        dtype = e.dtype(largest)
        codes = e.cast(_codes(e, c.input(1)), ir.DataType.INT32)
        values = e.op("Gather", e.constant(table, dtype), codes, dtype=dtype, shape=codes.shape)
        size = rows * columns
        flat = e.op("Reshape", values, e.int64([-1]), dtype=dtype, shape=ir.Shape([None]))
        if tail := -size % block:
            flat = e.op("Pad", flat, e.int64([0, tail]), dtype=dtype, shape=ir.Shape([None]))
        if size % 2 and tail:
            bounds = [e.int64([0]), e.int64([size + tail])]
            flat = e.op("Slice", flat, *bounds, dtype=dtype, shape=ir.Shape([size + tail]))
        blocks = e.op("Reshape", flat, e.int64([-1, block]), dtype=dtype, shape=ir.Shape([None, block]))
        scaled = e.mul(blocks, e.unsqueeze(largest, [1]))
        line = e.op("Reshape", scaled, e.int64([-1]), dtype=dtype, shape=ir.Shape([None]))
        if tail:
            line = e.op("Slice", line, e.int64([0]), e.int64([size]), dtype=dtype, shape=ir.Shape([size]))
        shape = ir.Shape([rows, columns])
        weight = e.op("Reshape", line, e.int64([rows, columns]), dtype=dtype, shape=shape)
        return e.matmul(c.cotangent, weight)

    return [activations]


RULES.refuse(
    "GatherBlockQuantized",
    domain=MICROSOFT,
    because="its data and scales are frozen and its indices are integers",
)
RULES.refuse("DequantizeLinear", because="quantized weights and their scales are frozen")
RULES.refuse("DequantizeLinear", domain=MICROSOFT, because="quantized weights and their scales are frozen")
