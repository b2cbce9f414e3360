"""Lower onnxruntime's `MultiHeadAttention` and `Attention` to the `Attention` of the standard."""

import numpy as np
import onnx_ir as ir

from ...graph import FLOAT, MICROSOFT, append, initializer
from .lowering import (
    BOOL,
    attend,
    causal_mask,
    given,
    key_mask,
    merge_heads,
    refuse,
    refuse_inputs,
    replace,
    split_heads,
    split_last,
    width,
)

_MHA_REFUSED = (
    (6, "past_key"),
    (7, "past_value"),
    (8, "past_sequence_length"),
    (9, "cache_indirection"),
)


def lower_packed_attention(graph: ir.Graph) -> int:
    """Rewrite com.microsoft's `Attention` as a product, `MatMul` and `Add`, and a `MultiHeadAttention`.

    Before: input float32 `[batch, sequence, hidden]`, weights `[hidden, q + k + v]`, bias `[q + k + v]`.
    After: the product is a linear `NODE/qkv_proj/MatMul` like any other. The caller sorts.

    Returns:
        How many were rewritten.

    Raises:
        ExportError: a node has a past, or rotates.
    """
    nodes = [node for node in graph if node.op_type == "Attention" and node.domain == MICROSOFT]
    for node in nodes:
        refuse_inputs(node, ((4, "past"), (6, "past_sequence_length")))
        if node.attributes.get_int("do_rotary", 0):
            raise refuse(node, "its attribute do_rotary is 1")
        x, weights, bias = (given(node, position) for position in (0, 1, 2))
        assert x is not None
        assert x.shape is not None
        assert weights is not None
        packed = width(node, weights)
        product = append(graph, "MatMul", [x, weights], shape=[*list(x.shape)[:-1], packed])
        producer = product.producer()
        assert producer is not None
        producer.name = f"{node.name}/qkv_proj/MatMul"
        if bias is not None:
            product = append(graph, "Add", [product, bias], shape=product.shape)
        sizes = list(node.attributes.get_ints("qkv_hidden_sizes", [])) or [packed // 3] * 3
        query, key, value = split_last(graph, product, sizes)
        attributes = {
            name: attribute.value
            for name, attribute in node.attributes.items()
            if name in ("num_heads", "unidirectional", "mask_filter_value", "scale")
        }
        fused = append(
            graph,
            "MultiHeadAttention",
            [query, key, value, None, given(node, 3), given(node, 5)],
            attributes,
            shape=value.shape,
            domain=MICROSOFT,
        )
        fused_node = fused.producer()
        assert fused_node is not None
        fused_node.name = node.name
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            raise refuse(node, "its present output is used")
        replace(graph, node, fused)
    return len(nodes)


def lower_multi_head_attention(graph: ir.Graph) -> int:
    """Rewrite every `MultiHeadAttention` without a past; the caller sorts and tidies.

    Before: query, key and value float32 `[batch, rows, heads * size]`, a bias `[q + k + v]` that is added to
    them, a key padding mask `[batch, keys]` (0: not attended to), an attention bias that is added to the
    scores. After: the same with `Attention` of the standard.

    Returns:
        How many were rewritten.

    Raises:
        ExportError: a node has a past, packed keys, or a mask of another shape.
    """
    nodes = [node for node in graph if node.op_type == "MultiHeadAttention" and node.domain == MICROSOFT]
    for node in nodes:
        refuse_inputs(node, _MHA_REFUSED)
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            raise refuse(node, "an output beside the first is used")
        replace(graph, node, _lowered(graph, node))
    return len(nodes)


def _lowered(graph: ir.Graph, node: ir.Node) -> ir.Value:
    heads = node.attributes["num_heads"].as_int()
    tensors = [given(node, position) for position in range(3)]
    bias = given(node, 3)
    if bias is not None:
        sizes = [width(node, value) for value in tensors if value is not None]
        if len(sizes) != 3:
            raise refuse(node, "its query, key and value are packed in one input")
        parts = split_last(graph, bias, sizes)
        tensors = [
            None if value is None else append(graph, "Add", [value, part], shape=value.shape)
            for value, part in zip(tensors, parts, strict=True)
        ]
    apart: list[ir.Value] = []
    for tensor in tensors:
        if tensor is None or tensor.shape is None or len(tensor.shape) not in (3, 4):
            raise refuse(node, "its query, key and value are packed in one input")
        packed = len(tensor.shape) == 3
        apart.append(split_heads(graph, tensor, heads, width(node, tensor) // heads) if packed else tensor)
    query, key, value = apart
    mask = _mask(graph, node, query, key)
    attended = attend(graph, query, key, value, mask, scale=node.attributes.get_float("scale", 0.0))
    return merge_heads(graph, attended)


def _mask(graph: ir.Graph, node: ir.Node, query: ir.Value, key: ir.Value) -> ir.Value | None:
    """Padding, causality and the attention bias as one mask of `[batch, heads or 1, rows, keys]`."""
    padding, addend = given(node, 4), given(node, 5)
    assert query.shape is not None
    assert key.shape is not None
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    seen = causal_mask(graph, query, 2) if node.attributes.get_int("unidirectional", 0) else None
    if padding is not None:
        if padding.shape is None or len(padding.shape) != 2:
            raise refuse(node, f"its mask has shape {padding.shape}, expected [batch, keys]")
        kept = append(graph, "Cast", [padding], {"to": BOOL}, shape=padding.shape, dtype=BOOL)
        ahead = key_mask(graph, kept)
        rows_and_keys = seen if seen is not None else _true_rows(graph, query)
        extent = [batch, 1, rows, keys]
        seen = append(graph, "And", [ahead, rows_and_keys], shape=extent, dtype=BOOL)
    if addend is None or seen is None:
        return addend if seen is None else seen
    filtered = node.attributes.get_float("mask_filter_value", -10000.0)
    low = initializer(graph, f"mask_filter_{filtered:g}", np.array(filtered, np.float32))
    assert addend.shape is not None
    shape = [batch, addend.shape[1], rows, keys]
    return append(graph, "Where", [seen, addend, low], shape=shape, dtype=FLOAT)


def _true_rows(graph: ir.Graph, query: ir.Value) -> ir.Value:
    """True for every query, boolean `[rows, 1]`."""
    assert query.shape is not None
    rows = query.shape[2]
    true = initializer(graph, "true", np.array([[True]]))
    length = append(graph, "Shape", [query], {"start": 2, "end": 3}, shape=[1], dtype=ir.DataType.INT64)
    one = initializer(graph, "one_axis", np.array([1], np.int64))
    extent = append(graph, "Concat", [length, one], {"axis": 0}, shape=[2], dtype=ir.DataType.INT64)
    return append(graph, "Expand", [true, extent], shape=[rows, 1], dtype=BOOL)
