"""Lower onnxruntime's `GroupQueryAttention` to `RotaryEmbedding` and `Attention` of the standard."""

import numpy as np
import onnx_ir as ir

from ...graph import INT64, MICROSOFT, append, initializer
from .lowering import (
    BOOL,
    attend,
    causal_mask,
    given,
    key_mask,
    merge_heads,
    positions,
    refuse,
    refuse_inputs,
    replace,
    split_heads,
    split_last,
    width,
)

_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _SEQLENS = range(6)
_COS, _SIN, _POSITIONS = 7, 8, 9
_REFUSED_INPUTS = (
    (10, "attention_bias"),
    (11, "head_sink"),
    (12, "k_scale"),
    (13, "v_scale"),
    (14, "q_norm_weight"),
    (15, "k_norm_weight"),
)
_REFUSED_ATTRIBUTES = ("smooth_softmax", "qk_output", "kv_cache_bit_width")
_REFUSED_TYPES = ("k_quant_type", "v_quant_type")


def lower_group_query_attention(graph: ir.Graph) -> int:
    """Rewrite every `GroupQueryAttention`, its past taken to be empty; the caller sorts and tidies.

    Before: query float32 `[batch, sequence, heads * size]` with key and value, or all three packed in it;
    `seqlens_k` int32 `[batch]`, the positions of a row but one; rotary caches where `do_rotary` is set.
    After: the same, with every row's keys up to its length and not behind the query (nor, with a
    `local_window_size`, further away than that) attended to. Positions that are padding hold other numbers
    than the operator leaves there.

    Returns:
        How many were rewritten.

    Raises:
        ExportError: a node has an input or attribute that has no counterpart, or sizes that are not static.
    """
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]
    for node in nodes:
        _check(node)
        replace(graph, node, _lowered(graph, node))
    return len(nodes)


def _check(node: ir.Node) -> None:
    refuse_inputs(node, _REFUSED_INPUTS)
    for name in _REFUSED_ATTRIBUTES:
        if node.attributes.get_int(name, 0) > 0:
            raise refuse(node, f"its attribute {name} is {node.attributes.get_int(name)}")
    for name in _REFUSED_TYPES:
        if node.attributes.get_string(name, "NONE") != "NONE":
            raise refuse(node, f"its attribute {name} is {node.attributes.get_string(name)}")
    if not node.attributes.get_int("causal", 1):
        raise refuse(node, "its attribute causal is 0")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise refuse(node, "its cache is read in the graph")
    if given(node, _SEQLENS) is None:
        raise refuse(node, "it has no seqlens_k")


def _lowered(graph: ir.Graph, node: ir.Node) -> ir.Value:
    heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    query, key, value = (given(node, position) for position in (_QUERY, _KEY, _VALUE))
    assert query is not None
    if key is None or value is None:
        size = width(node, query) // (heads + 2 * kv_heads)
        query, key, value = split_last(graph, query, [heads * size, kv_heads * size, kv_heads * size])
    else:
        size = width(node, query) // heads
    apart = [split_heads(graph, query, heads, size), split_heads(graph, key, kv_heads, size)]
    if node.attributes.get_int("do_rotary", 0):
        apart = [_rotated(graph, node, part, query) for part in apart]
    window = node.attributes.get_int("local_window_size", -1)
    seen = causal_mask(graph, query, 1, window if window > 0 else None)
    mask = _masked(graph, node, query, seen)
    attended = attend(
        graph,
        apart[0],
        apart[1],
        split_heads(graph, value, kv_heads, size),
        mask,
        scale=node.attributes.get_float("scale", 0.0),
        softcap=node.attributes.get_float("softcap", 0.0),
    )
    return merge_heads(graph, attended)


def _masked(graph: ir.Graph, node: ir.Node, query: ir.Value, seen: ir.Value) -> ir.Value:
    """`seen` and the lengths of the rows, boolean `[batch, 1, sequence, sequence]`."""
    lengths = given(node, _SEQLENS)
    assert lengths is not None
    assert query.shape is not None
    batch, rows = query.shape[0], query.shape[1]
    column = initializer(graph, "column", np.array([-1, 1], np.int64))
    last = append(graph, "Cast", [lengths], {"to": INT64}, shape=lengths.shape, dtype=INT64)
    ends = append(graph, "Reshape", [last, column], shape=[batch, 1], dtype=INT64)
    kept = append(graph, "LessOrEqual", [positions(graph, query, 1), ends], shape=[batch, rows], dtype=BOOL)
    return append(graph, "And", [key_mask(graph, kept), seen], shape=[batch, 1, rows, rows], dtype=BOOL)


def _rotated(graph: ir.Graph, node: ir.Node, value: ir.Value, query: ir.Value) -> ir.Value:
    """`[batch, heads, rows, head_size]` turned by each row's position."""
    cos, sin = given(node, _COS), given(node, _SIN)
    if cos is None or sin is None or cos.shape is None:
        raise refuse(node, "do_rotary is set and it has no cos_cache and sin_cache")
    assert value.shape is not None
    assert query.shape is not None
    batch, _, rows, size = value.shape
    ids = given(node, _POSITIONS)
    if ids is None:
        extent = append(graph, "Shape", [query], {"start": 0, "end": 2}, shape=[2], dtype=INT64)
        ids = append(graph, "Expand", [positions(graph, query, 1), extent], shape=[batch, rows], dtype=INT64)
    attributes = {"interleaved": node.attributes.get_int("rotary_interleaved", 0)}
    turned = 2 * width(node, cos)
    if turned != size:
        attributes["rotary_embedding_dim"] = turned
    return append(graph, "RotaryEmbedding", [value, cos, sin, ids], attributes, shape=value.shape)
