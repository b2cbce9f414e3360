"""Take the key/value cache away from a graph that is to be trained: a step sees whole sequences."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

from ..graph import INT64, append, initializer

PAST, PRESENT = "past_key_values.", "present."


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input or output is a part of the cache."""
    return (value.name or "").startswith((PAST, PRESENT))


def drop_cache(graph: ir.Graph) -> None:
    """Remove the inputs `past_key_values.*` and the outputs `present.*`; the caller sorts and tidies.

    A `Concat` of the past with what is new becomes what is new; anything else that reads the past gets one of
    length 0, `[batch, kv_heads, 0, head_dim]`, with the batch of the first input. Axes as long as the past
    and the tokens together are named as the tokens' own.

    Raises:
        ExportError: a past has a head count or head size that is not static.
    """
    graph.outputs[:] = [value for value in graph.outputs if not is_cache(value)]
    pasts = [value for value in graph.inputs if is_cache(value)]
    _rename_totals(graph, pasts)
    graph.inputs[:] = [value for value in graph.inputs if not is_cache(value)]
    for past in pasts:
        for node, position in list(past.uses()):
            if node.op_type == "Concat" and len(node.inputs) == 2 and position == 0:
                node.outputs[0].replace_all_uses_with(node.inputs[1])  # type: ignore[arg-type]
                graph.remove(node, safe=True)
        if past.uses():
            past.replace_all_uses_with(_empty(graph, past))


def _rename_totals(graph: ir.Graph, pasts: Sequence[ir.Value]) -> None:
    """Name axes by the lengths they have now, so that folding sees which are equal."""
    lengths = {str(past.shape[2]) for past in pasts if past.shape is not None and len(past.shape) == 4}
    axes = {value.name: value.shape[-1] for value in graph.inputs if value.shape}
    tokens, total = axes.get("input_ids"), axes.get("attention_mask")

    def shorter(dim: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim | None:
        if isinstance(dim, int) or dim.value is None:
            return dim
        if dim == total:
            return tokens
        return " + ".join(part for part in dim.value.split(" + ") if part not in lengths) or dim

    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None and not is_cache(value):
            value.shape = ir.Shape([shorter(dim) for dim in value.shape])


def _empty(graph: ir.Graph, past: ir.Value) -> ir.Value:
    shape: Sequence[int | ir.SymbolicDim] = list(past.shape or [])
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise ExportError(
            f"input {past.name!r}: has shape {past.shape}, expected [batch, heads, past, head size] with "
            "static heads and head size: export the model without a cache"
        )
    like = graph.inputs[0]
    assert like.shape is not None
    nothing = np.zeros((1, shape[1], 0, shape[3]), np.float32)
    base = initializer(graph, f"no_past_{shape[1]}_{shape[3]}", nothing)
    ones = initializer(graph, "no_past_axes", np.array([1, 1, 1], np.int64))
    batch = append(graph, "Shape", [like], {"start": 0, "end": 1}, shape=[1], dtype=INT64)
    target = append(graph, "Concat", [batch, ones], {"axis": 0}, shape=[4], dtype=INT64)
    return append(graph, "Expand", [base, target], shape=[like.shape[0], shape[1], 0, shape[3]])
