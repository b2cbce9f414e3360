"""Compute `position_ids` inside the graph, so that tokens and a mask are all that a caller has to give."""

import numpy as np
import onnx_ir as ir

from ...graph import INT64, append, initializer


def derive_position_ids(graph: ir.Graph) -> bool:
    """Replace the input `position_ids` int64 `[batch, sequence]` by a computation; the caller sorts.

    A token's position is the number of attended positions before it, as transformers' `generate` has it:
    `max(cumsum(attention_mask) - 1, 0)`, of which the last `sequence` count where there is a past. Without an
    `attention_mask` it is 0, 1, ….

    Returns:
        Whether there was such an input.
    """
    inputs = {value.name: value for value in graph.inputs}
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        return False
    ids = inputs["input_ids"]
    assert ids.shape is not None
    length = append(graph, "Shape", [ids], {"start": 1, "end": 2}, shape=[1], dtype=INT64)
    axis = initializer(graph, "position_axis", np.array(1, np.int64))
    one = initializer(graph, "position_one", np.array(1, np.int64))
    zero = initializer(graph, "position_zero", np.array(0, np.int64))
    mask = inputs.get("attention_mask")
    if mask is None:
        size = append(graph, "Shape", [ids], shape=[2], dtype=INT64)
        mask = append(graph, "Expand", [one, size], shape=ids.shape, dtype=INT64)
    counted = append(graph, "CumSum", [mask, axis], shape=mask.shape, dtype=INT64)
    before = append(graph, "Sub", [counted, one], shape=mask.shape, dtype=INT64)
    positions = append(graph, "Max", [before, zero], shape=mask.shape, dtype=INT64)
    start = append(graph, "Neg", [length], shape=[1], dtype=INT64)
    end = initializer(graph, "position_end", np.array([np.iinfo(np.int64).max], np.int64))
    axes = initializer(graph, "position_axes", np.array([1], np.int64))
    last = append(graph, "Slice", [positions, start, end, axes], shape=ids.shape, dtype=INT64)
    position_ids.replace_all_uses_with(last)
    graph.inputs.remove(position_ids)
    return True
