"""Give the caches of `RotaryEmbedding` the batch axis that the operator asks for.

onnxscript's fusion hands over cos and sin as the model computed them, `[1, sequence, head_dim / 2]`; the
operator (ai.onnx, version 23) wants `[batch, sequence, head_dim / 2]` and onnxruntime refuses anything else.
"""

import numpy as np
import onnx_ir as ir

from ...graph import INT64, append, initializer


def expand_rotary_caches(graph: ir.Graph) -> None:
    """Expand every cache of batch 1 to the batch of the first graph input; the caller sorts and merges."""
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain:
            continue
        for position in (1, 2):
            cache = node.inputs[position]
            assert cache is not None
            if (len(node.inputs) < 4 or node.inputs[3] is None) and _batch(cache) == 1:
                node.replace_input_with(position, _expanded(graph, cache))


def _batch(cache: ir.Value) -> object:
    """The leading axis; an elementwise function of one input has that input's."""
    shape = cache.shape
    producer = cache.producer()
    if shape is None and producer is not None and producer.op_type in ("Cos", "Sin"):
        source = producer.inputs[0]
        assert source is not None
        cache.shape, cache.type = source.shape, source.type
        shape = cache.shape
    return shape[0] if shape is not None else None


def _expanded(graph: ir.Graph, cache: ir.Value) -> ir.Value:
    like = graph.inputs[0]
    assert like.shape is not None
    assert cache.shape is not None
    ones = initializer(graph, "rotary_ones", np.array([1, 1], np.int64))
    batch = append(graph, "Shape", [like], {"start": 0, "end": 1}, shape=[1], dtype=INT64)
    target = append(graph, "Concat", [batch, ones], {"axis": 0}, shape=[3], dtype=INT64)
    return append(graph, "Expand", [cache, target], shape=[like.shape[0], *list(cache.shape)[1:]])
