"""Pool token embeddings into a sentence embedding, as sentence-transformers does."""

import numpy as np
import onnx_ir as ir

from ..graph import FLOAT, append, initializer
from .base import Pooling

BOOL = ir.DataType.BOOL


def append_pooling(graph: ir.Graph, pooling: Pooling) -> ir.Value:
    """Replace the graph's outputs by `sentence_embedding` float32 `[batch, width]`.

    `mean`: Σ mask * h / max(Σ mask, 1e-9) over the sequence; `max`: the largest h where the mask is 1; `cls`:
    h[:, 0]. Normalized: divided by max(‖·‖₂, 1e-12). The first output must be the last hidden state, float32
    `[batch, sequence, width]`.
    """
    hidden = graph.outputs[0]
    assert hidden.shape is not None
    batch, sequence, width = hidden.shape
    axis_1 = initializer(graph, "pooling_axis", np.array([1], np.int64))
    if pooling.mode == "cls":
        first = initializer(graph, "pooling_first", np.array(0, np.int64))
        pooled = append(graph, "Gather", [hidden, first], {"axis": 1}, shape=[batch, width])
    else:
        attention_mask = next(value for value in graph.inputs if value.name == "attention_mask")
        last = initializer(graph, "axis_last", np.array([-1], np.int64))
    if pooling.mode == "max":
        attended = append(graph, "Cast", [attention_mask], {"to": BOOL}, shape=[batch, sequence], dtype=BOOL)
        mask = append(graph, "Unsqueeze", [attended, last], shape=[batch, sequence, 1], dtype=BOOL)
        lowest = initializer(graph, "pooling_lowest", np.array(-1e9, np.float32))
        masked = append(graph, "Where", [mask, hidden, lowest], shape=hidden.shape)
        pooled = append(graph, "ReduceMax", [masked, axis_1], {"keepdims": 0}, shape=[batch, width])
    if pooling.mode == "mean":
        as_float = append(graph, "Cast", [attention_mask], {"to": FLOAT}, shape=[batch, sequence])
        mask = append(graph, "Unsqueeze", [as_float, last], shape=[batch, sequence, 1])
        masked = append(graph, "Mul", [hidden, mask], shape=hidden.shape)
        total = append(graph, "ReduceSum", [masked, axis_1], {"keepdims": 0}, shape=[batch, width])
        counted = append(graph, "ReduceSum", [mask, axis_1], {"keepdims": 0}, shape=[batch, 1])
        floor = initializer(graph, "pooling_floor", np.array(1e-9, np.float32))
        count = append(graph, "Max", [counted, floor], shape=[batch, 1])
        pooled = append(graph, "Div", [total, count], shape=[batch, width])
    if pooling.normalize:
        norm = append(graph, "ReduceL2", [pooled, axis_1], {"keepdims": 1}, shape=[batch, 1])
        tiny = initializer(graph, "normalize_floor", np.array(1e-12, np.float32))
        floored = append(graph, "Max", [norm, tiny], shape=[batch, 1])
        pooled = append(graph, "Div", [pooled, floored], shape=[batch, width])
    pooled.name = "sentence_embedding"
    graph.outputs[:] = [pooled]
    return pooled
