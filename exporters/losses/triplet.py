"""Triplet loss of sentence embeddings."""

import numpy as np
import onnx_ir as ir

from ..graph import append, initializer

MARGIN = 5.0
#: Added to each difference before its norm is taken, so that equal embeddings have a gradient.
EPSILON = 1e-6


def triplet_loss(graph: ir.Graph, embedding: ir.Value) -> ir.Value:
    """Mean of `max(|anchor - positive| - |anchor - negative| + 5, 0)`, Euclidean.

    Args:
        embedding: float32 `[3 * triplets, width]`: all anchors, all positives, all negatives in one order.

    Source: sentence-transformers' `TripletLoss` with its defaults, over `torch.nn.functional`'s
    `pairwise_distance`.
    """
    assert embedding.shape is not None
    width = embedding.shape[1]
    thirds = ir.node("Split", [embedding], {"axis": 0, "num_outputs": 3}, num_outputs=3)
    graph.append(thirds)
    for third in thirds.outputs:
        third.shape, third.type = ir.Shape(["triplets", width]), embedding.type
    anchor, positive, negative = thirds.outputs
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    first = initializer(graph, "axis_first", np.array([0], np.int64))
    epsilon = initializer(graph, "distance_epsilon", np.array(EPSILON, np.float32))
    margin = initializer(graph, "triplet_margin", np.array(MARGIN, np.float32))

    def distance(other: ir.Value) -> ir.Value:
        difference = append(graph, "Sub", [anchor, other], shape=["triplets", width])
        moved = append(graph, "Add", [difference, epsilon], shape=["triplets", width])
        return append(graph, "ReduceL2", [moved, last], {"keepdims": 0}, shape=["triplets"])

    gap = append(graph, "Sub", [distance(positive), distance(negative)], shape=["triplets"])
    above = append(
        graph, "Relu", [append(graph, "Add", [gap, margin], shape=["triplets"])], shape=["triplets"]
    )
    return append(graph, "ReduceMean", [above, first], {"keepdims": 0}, shape=[])
