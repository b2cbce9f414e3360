"""What a graph computes from the sizes of its inputs alone: masks and rotary angles, as numbers.

Models write a causal mask, a sliding window or the angles of a position in many ways. What they come to is
asked of the graph itself, at sizes of one's choosing, and not of the way it is written.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..drop_cache import is_cache


def evaluate(
    model: ir.Model, values: Sequence[ir.Value], *, sequence: int, past: int
) -> list[np.ndarray] | None:
    """Values of a language model's graph for one row, every position attended.

    Args:
        model: the graph, its weights inputs.
        values: of the graph, none of them an input.
        sequence: tokens of the run.
        past: tokens in the cache before it.

    Returns:
        The values, or None where one depends on more than sizes and the mask: on weights, or on the tokens.
    """
    part = model.clone()
    graph = part.graph
    found = {output.name: output for node in graph for output in node.outputs}
    graph.outputs[:] = [found[value.name] for value in values]
    RemoveUnusedNodesPass()(part)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    sizes = {"batch": 1, "sequence": sequence, "past_sequence": past, "total_sequence": past + sequence}
    feeds = {}
    for value in graph.inputs:
        if value.name != "attention_mask" and not _read_for_its_sizes(value):
            return None
        shape = _resolved(value, sizes)
        if shape is None or value.dtype is None:
            return None
        feeds[str(value.name)] = np.ones(shape, value.dtype.numpy())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(part).SerializeToString(), options)
    return list(session.run(None, feeds))


def _read_for_its_sizes(value: ir.Value) -> bool:
    known = (value.name or "") == "input_ids" or is_cache(value)
    return known and all(node.op_type == "Shape" for node, _ in value.uses())


def _resolved(value: ir.Value, sizes: Mapping[str, int]) -> list[int] | None:
    dims = [dim if isinstance(dim, int) else sizes.get(str(dim.value)) for dim in value.shape or ()]
    return None if any(dim is None for dim in dims) else [int(dim) for dim in dims if dim is not None]
