"""Multiple-negatives ranking loss of sentence embeddings."""

import numpy as np
import onnx_ir as ir

from ..graph import INT64, append, initializer
from .cross_entropy import cross_entropy

SCALE = 20.0


def contrastive_loss(graph: ir.Graph, embedding: ir.Value) -> ir.Value:
    """Cross-entropy of `20 * cos(anchor_i, positive_j)` against `j = i`: the other positives are the
    negatives.

    Args:
        embedding: float32 `[2 * pairs, width]`: all anchors, then all positives in the same order.

    Source: sentence-transformers' `MultipleNegativesRankingLoss` (arXiv 1705.00652).
    """
    assert embedding.shape is not None
    width = embedding.shape[1]
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    epsilon = initializer(graph, "norm_epsilon", np.array(1e-8, np.float32))
    norm = append(graph, "ReduceL2", [embedding, last], {"keepdims": 1}, shape=[embedding.shape[0], 1])
    unit = append(
        graph,
        "Div",
        [embedding, append(graph, "Max", [norm, epsilon], shape=norm.shape)],
        shape=embedding.shape,
    )
    halves = ir.node("Split", [unit], {"axis": 0, "num_outputs": 2}, num_outputs=2)
    graph.append(halves)
    anchors, positives = halves.outputs
    for half in halves.outputs:
        half.shape, half.type = ir.Shape(["pairs", width]), embedding.type
    transposed = append(graph, "Transpose", [positives], {"perm": [1, 0]}, shape=[width, "pairs"])
    cosine = append(graph, "MatMul", [anchors, transposed], shape=["pairs", "pairs"])
    scale = initializer(graph, "ranking_scale", np.array(SCALE, np.float32))
    scores = append(graph, "Mul", [cosine, scale], shape=["pairs", "pairs"])
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    one = initializer(graph, "one_int64", np.array(1, np.int64))
    count = append(graph, "Shape", [anchors], {"start": 0, "end": 1}, shape=[1], dtype=INT64)
    pairs = append(graph, "Squeeze", [count], shape=[], dtype=INT64)
    diagonal = append(graph, "Range", [zero, pairs, one], shape=["pairs"], dtype=INT64)
    return cross_entropy(graph, scores, diagonal)
