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
from ..shapes import Dim, broadcast_shapes

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
        if isinstance(self.rows, int):
            spec = self.e.int64([0, self.kv_heads, self.groups * self.rows, self.head_size])
            return self.e.op("Reshape", value, spec, dtype=value.dtype, shape=shape)
        spec = self.e.int64([0, self.kv_heads, -1, self.head_size])
        return self.e.op("Reshape", value, spec, dtype=value.dtype, shape=shape)

    def ungroup(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """The inverse of `group`."""
        if self.groups == 1:
            return value
        return self.e.op("Reshape", value, self.e.shape_of(like), like=like, allowzero=1)


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
    def q_split(self) -> ir.Value:
        """The query as `[batch, heads, rows, head_size]`."""
        return self.q_heads.split(self.c.input(0))

    @cached_property
    def q(self) -> ir.Value:
        """The grouped query."""
        return self.q_heads.group(self.q_split)

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
        """The grouped cotangent of the output."""
        return self.y_heads.group(self.y_heads.split(self.c.cotangent))

    @property
    def score_shape(self) -> ir.Shape:
        """`[batch, heads, rows, kv_rows]`"""
        heads = self.q_heads
        return ir.Shape([heads.batch, heads.heads, heads.rows, self.k_heads.rows])

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
        return self.e.unary("Softmax", self._masked(scores), axis=-1)

    @cached_property
    def dscores(self) -> ir.Value:
        """The cotangent of scale · q kᵀ, grouped."""
        e = self.e
        row_sum = e.sum(e.mul(self.dy, self.y), [3])
        ds = e.mul(self.p, e.sub(e.matmul(self.dy, self.v, trans_b=True), row_sum))
        if not self.softcap:
            return ds
        return e.mul(ds, e.sub(e.scalar(1, ds), e.mul(self.tanh, self.tanh)))

    def _masked(self, scores: ir.Value) -> ir.Value:
        """The grouped scores with mask and causality applied."""
        e, mask, causal = self.e, self.c.optional_input(3), self.c.attr_int("is_causal", 0)
        if mask is None and not causal:
            return scores
        full = scores
        if self.q_heads.groups > 1:
            shape = e.concat([e.dim_of(self.q_split, i) for i in range(3)] + [e.dim_of(self.k, 2)], axis=0)
            full = e.op("Reshape", scores, shape, dtype=scores.dtype, shape=self.score_shape, allowzero=1)
        if mask is not None:
            full = self._apply(full, mask)
        if causal:
            full = self._apply(full, self._causal_mask())
        if self.q_heads.groups > 1:
            spec = e.shape_of(scores)
            full = e.op("Reshape", full, spec, like=scores, allowzero=1)
        return full

    def _apply(self, scores: ir.Value, mask: ir.Value) -> ir.Value:
        e = self.e
        shape = broadcast_shapes(scores.shape, mask.shape)
        if mask.dtype == ir.DataType.BOOL:
            # onnxruntime adds the lowest finite number where the mask is false.
            lowest = e.constant(np.finfo(e.dtype(scores).numpy()).min, e.dtype(scores))
            return e.op("Where", mask, scores, lowest, dtype=scores.dtype, shape=shape)
        return e.op("Add", scores, mask, dtype=scores.dtype, shape=shape)

    def _causal_mask(self) -> ir.Value:
        """True where a key is not behind its query, boolean `[rows, kv_rows]`."""
        e = self.e
        shape = ir.Shape([self.q_heads.rows, self.k_heads.rows])
        size = e.concat([e.dim_of(self.q_split, 2), e.dim_of(self.k, 2)], axis=0)
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
        return a.q_heads.merge(a.q_heads.ungroup(grouped, a.q_split))

    def into_k() -> ir.Value:
        return a.k_heads.merge(e.matmul(a.dscores, a.q, trans_a=True, alpha=a.scale))

    def into_v() -> ir.Value:
        return a.v_heads.merge(e.matmul(a.p, a.dy, trans_a=True))

    return [into_q, into_k, into_v]
