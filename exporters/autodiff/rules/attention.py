"""Attention and rotary embeddings of the standard."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from ..context import RuleContext
from ..emitter import Emitter
from ..registry import RULES, RuleResult
from ..shapes import Dim

rule = RULES.rule


def _rotary_refusal(node: ir.Node) -> str | None:
    if node.inputs[0] is not None and node.inputs[0].shape is None:
        return "the rank of its input is unknown: run shape inference"
    return None


@rule("RotaryEmbedding", since=23, until=23, differentiable=(0,), refuses=_rotary_refusal)
def rotary_embedding(c: RuleContext) -> RuleResult:
    """x̄ = ȳ rotated back, which is a rotation with −sin"""
    e = c.emit
    attributes: dict[str, Any] = {
        name: c.attr_int(name, 0)
        for name in ("interleaved", "num_heads", "rotary_embedding_dim")
        if name in c.node.attributes
    }
    return [
        lambda: e.op(
            "RotaryEmbedding",
            c.cotangent,
            c.input(1),
            e.neg(c.input(2)),
            *c.node.inputs[3:],
            like=c.input(0),
            **attributes,
        )
    ]


def _attention_refusal(node: ir.Node) -> str | None:
    for position, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        if len(node.inputs) > position and node.inputs[position] is not None:
            return f"it has a {name}, and training has no cache: export the model without one"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "an output beside Y is used, and training has no cache: export the model without one"
    for name in ("left_window_size", "right_window_size"):
        if name in node.attributes and node.attributes[name].as_int() >= 0:
            return f"{name} is not supported: give the window as a mask"
    for value, name in zip(node.inputs[:3], "QKV", strict=False):
        if value is None or value.shape is None:
            return f"the rank of {name} is unknown: run shape inference"
        heads_axis = 1 if value.shape.rank() == 4 else 2
        if not isinstance(value.shape[heads_axis], int) or not isinstance(value.shape[-1], int):
            return f"the heads or the head size of {name} are not static, got {value.shape}"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and (mask.shape is None or mask.shape.rank() < 2):
        return "its mask is not known to have rows and columns, which onnxruntime needs"
    if mask is not None and mask.shape is not None and mask.shape.rank() > 2:
        heads = mask.shape[-3]
        if not isinstance(heads, int):
            return f"the heads of its mask are not static, got {mask.shape}"
    return None


class _Heads:
    """A query, key or value in the layout `[batch, kv_heads, rows, head_size]`, and the way back."""

    def __init__(self, e: Emitter, value: ir.Value, heads: int, kv_heads: int) -> None:
        self.e, self.primal = e, value
        self.heads, self.kv_heads, self.groups = heads, kv_heads, heads // kv_heads
        shape = e.shape(value)
        self.batch: Dim = shape[0]
        self.packed = shape.rank() == 3
        self.rows: Dim = shape[1] if self.packed else shape[2]
        last = int(shape[-1])  # type: ignore[arg-type]
        self.head_size = last // heads if self.packed else last

    @property
    def shape(self) -> ir.Shape:
        """`[batch, heads, rows, head_size]`"""
        return ir.Shape([self.batch, self.heads, self.rows, self.head_size])

    def split(self, value: ir.Value) -> ir.Value:
        """`value`, in the primal's layout, as `[batch, heads, rows, head_size]`."""
        if not self.packed:
            return value
        shape = ir.Shape([self.batch, self.rows, self.heads, self.head_size])
        spec = self.e.int64([0, 0, self.heads, self.head_size])
        return self.e.transpose(
            self.e.op("Reshape", value, spec, dtype=value.dtype, shape=shape), [0, 2, 1, 3]
        )

    def merge(self, value: ir.Value) -> ir.Value:
        """The inverse of `split`."""
        if not self.packed:
            return value
        rows_first = self.e.transpose(value, [0, 2, 1, 3])
        spec = self.e.int64([0, 0, self.heads * self.head_size])
        return self.e.op("Reshape", rows_first, spec, like=self.primal)

    def group(self, value: ir.Value) -> ir.Value:
        """Lays the query heads that share a key head under each other: `[batch, kv_heads, rows', size]`."""
        if self.groups == 1:
            return value
        rows = self.groups * self.rows if isinstance(self.rows, int) else None
        shape = ir.Shape([self.batch, self.kv_heads, rows, self.head_size])
        spec = self.e.int64([0, self.kv_heads, -1, self.head_size])
        return self.e.op("Reshape", value, spec, dtype=value.dtype, shape=shape)

    def ungroup(self, value: ir.Value) -> ir.Value:
        """The inverse of `group`."""
        if self.groups == 1:
            return value
        spec = self.e.int64([0, self.heads, -1, self.head_size])
        return self.e.op("Reshape", value, spec, dtype=value.dtype, shape=self.shape)


class _Attention:
    """The pieces of one Attention node that its cotangents share; probabilities are computed again.

    Every piece is emitted when it is first asked for.
    """

    def __init__(self, c: RuleContext) -> None:
        self.c, self.e = c, c.emit
        q, k, v = c.input(0), c.input(1), c.input(2)
        packed = self.e.rank(q) == 3
        heads = c.attr_int("q_num_heads", 0) if packed else int(self.e.shape(q)[1])  # type: ignore[arg-type]
        kv_heads = c.attr_int("kv_num_heads", 0) if packed else int(self.e.shape(k)[1])  # type: ignore[arg-type]
        self.q_heads = _Heads(self.e, q, heads, kv_heads)
        self.k_heads = _Heads(self.e, k, kv_heads, kv_heads)
        self.v_heads = _Heads(self.e, v, kv_heads, kv_heads)
        self.y_heads = _Heads(self.e, c.output, heads, kv_heads)
        self.scale = c.attr_float("scale", 0.0) or 1 / math.sqrt(self.q_heads.head_size)
        self.softcap = c.attr_float("softcap", 0.0)

    @cached_property
    def q(self) -> ir.Value:
        """The grouped query."""
        return self.q_heads.group(self.q_heads.split(self.c.input(0)))

    @cached_property
    def k(self) -> ir.Value:
        """The key as `[batch, kv_heads, kv_rows, head_size]`."""
        return self.k_heads.split(self.c.input(1))

    @cached_property
    def v(self) -> ir.Value:
        """The value as `[batch, kv_heads, kv_rows, v_head_size]`."""
        return self.v_heads.split(self.c.input(2))

    @cached_property
    def y(self) -> ir.Value:
        """The grouped output."""
        return self.y_heads.group(self.y_heads.split(self.c.output))

    @cached_property
    def dy(self) -> ir.Value:
        """The grouped cotangent of the output, 0 in rows without a key, whose output is 0."""
        e, dy = self.e, self.y_heads.split(self.c.cotangent)
        if self.c.optional_input(3) is not None and self.bias is not None:
            highest = e.reduce("ReduceMax", self.bias, [-1], keepdims=True)
            alive = e.compare("Greater", highest, self.lowest)
            dy = e.where(alive, dy, e.scalar(0, dy))
            dy.shape = self.y_heads.shape
        return self.y_heads.group(dy)

    @cached_property
    def raw_scores(self) -> ir.Value:
        """scale · q kᵀ, grouped."""
        return self.e.matmul(self.q, self.k, trans_b=True, alpha=self.scale)

    @cached_property
    def tanh(self) -> ir.Value:
        """tanh of the scores over the cap, grouped."""
        return self.e.unary("Tanh", self.e.scale(self.raw_scores, 1 / self.softcap))

    @cached_property
    def p(self) -> ir.Value:
        """The probabilities, grouped."""
        scores = self.e.scale(self.tanh, self.softcap) if self.softcap else self.raw_scores
        bias = self.grouped_bias
        if bias is not None:
            scores = self.e.op("Add", scores, bias, like=scores)
        return self.e.unary("Softmax", scores, axis=-1)

    @cached_property
    def dscores(self) -> ir.Value:
        """The cotangent of scale · q kᵀ, grouped."""
        e = self.e
        row_sum = e.sum(e.mul(self.dy, self.y), [3])
        ds = e.mul(self.p, e.sub(e.matmul(self.dy, self.v, trans_b=True), row_sum))
        if not self.softcap:
            return ds
        return e.mul(ds, e.sub(e.scalar(1, ds), e.mul(self.tanh, self.tanh)))

    @cached_property
    def lowest(self) -> ir.Value:
        """What is added to the score of a key that is not attended to: as onnxruntime, a finite number."""
        dtype = self.e.dtype(self.c.input(0))
        return self.e.constant(np.finfo(dtype.numpy()).min, dtype)

    @cached_property
    def bias(self) -> ir.Value | None:
        """Mask and causality as one addend of the scores; layers with the same mask share it."""
        e, mask = self.e, self.c.optional_input(3)
        bias: ir.Value | None = None
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            bias = e.where(mask, e.scalar(0, self.lowest), self.lowest)
        elif mask is not None:
            bias = e.binary("Max", mask, self.lowest)
        if self.c.attr_int("is_causal", 0):
            bias = e.where(
                self._causal_mask(), e.scalar(0, self.lowest) if bias is None else bias, self.lowest
            )
        return bias

    @cached_property
    def grouped_bias(self) -> ir.Value | None:
        """The bias repeated for the query heads that lie under each other."""
        e, bias, heads = self.e, self.bias, self.q_heads
        if bias is None or heads.groups == 1:
            return bias
        dims, rank = list(e.shape(bias)), e.rank(bias)
        if rank == 2 or dims[-3] == 1:
            return e.concat([bias] * heads.groups, axis=rank - 2)
        spec = e.int64([*[0] * (rank - 3), heads.kv_heads, -1, 0])
        shape = ir.Shape([*dims[:-3], heads.kv_heads, None, dims[-1]])
        return e.op("Reshape", bias, spec, dtype=bias.dtype, shape=shape)

    def _causal_mask(self) -> ir.Value:
        """True where a key is not behind its query, boolean `[rows, kv_rows]`."""
        e = self.e
        shape = ir.Shape([self.q_heads.rows, self.k_heads.rows])
        rows, columns = (e.dim_of(self.c.input(i), 1 if self.q_heads.packed else 2) for i in (0, 1))
        size = e.concat([rows, columns], axis=0)
        ones = e.op("Expand", e.constant(1, ir.DataType.INT32), size, dtype=ir.DataType.INT32, shape=shape)
        lower = e.op("Trilu", ones, dtype=ir.DataType.INT32, shape=shape, upper=0)
        return e.cast(lower, ir.DataType.BOOL)


@rule("Attention", since=23, until=24, differentiable=(0, 1, 2), refuses=_attention_refusal)
def attention(c: RuleContext) -> RuleResult:
    """s = scale·q·kᵀ, z = cap·tanh(s/cap), p = softmax(z + mask):
    v̄ = pᵀ ȳ,  z̄ = p·(ȳ vᵀ − Σ ȳ·y),  s̄ = z̄·(1 − tanh²(s/cap)),  q̄ = scale·s̄ k,  k̄ = scale·s̄ᵀ q;
    query heads that share a key head lie under each other as rows, so their sums are part of the products
    """
    e, a = c.emit, _Attention(c)

    def into_q() -> ir.Value:
        grouped = e.matmul(a.dscores, a.k, alpha=a.scale)
        return a.q_heads.merge(a.q_heads.ungroup(grouped))

    def into_k() -> ir.Value:
        return a.k_heads.merge(e.matmul(a.dscores, a.q, trans_a=True, alpha=a.scale))

    def into_v() -> ir.Value:
        return a.v_heads.merge(e.matmul(a.p, a.dy, trans_a=True))

    return [into_q, into_k, into_v]
