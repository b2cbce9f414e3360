"""What the lowerings of onnxruntime's fused attention operators share: heads, masks and the operator of the
standard (`Attention` of ai.onnx, version 23), which has a gradient rule."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

from ...graph import FLOAT, INT64, append, initializer

BOOL = ir.DataType.BOOL


def given(node: ir.Node, position: int) -> ir.Value | None:
    """An optional input, or None where it is absent."""
    return node.inputs[position] if position < len(node.inputs) else None


def refuse(node: ir.Node, reason: str) -> ExportError:
    """What is raised for a node that cannot be lowered."""
    return ExportError(
        f"{node.domain}::{node.op_type}, node {node.name!r}, cannot be trained: {reason}; export without "
        "training, or write the file without this fusion"
    )


def replace(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Put `output` in the place of the node's first output, whose name a graph output keeps."""
    old = node.outputs[0]
    if old.is_graph_output():
        output.name, old.name = old.name, None
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def refuse_inputs(node: ir.Node, names: Sequence[tuple[int, str]]) -> None:
    """Raise for the first of `names` that the node has."""
    for position, name in names:
        if given(node, position) is not None:
            raise refuse(node, f"its input {name} has no counterpart in ai.onnx::Attention")


def width(node: ir.Node, value: ir.Value) -> int:
    """The static last dimension of a value.

    Raises:
        ExportError: it is not static.
    """
    last = value.shape[-1] if value.shape is not None else None
    if not isinstance(last, int):
        raise refuse(node, f"the width of {value.name!r} is not static, got shape {value.shape}")
    return last


def split_heads(graph: ir.Graph, value: ir.Value, heads: int, head_size: int) -> ir.Value:
    """`[batch, rows, heads * head_size]` as `[batch, heads, rows, head_size]`."""
    assert value.shape is not None
    batch, rows = value.shape[0], value.shape[1]
    spec = initializer(graph, f"heads_{heads}_{head_size}", np.array([0, 0, heads, head_size], np.int64))
    apart = append(graph, "Reshape", [value, spec], shape=[batch, rows, heads, head_size])
    return append(graph, "Transpose", [apart], {"perm": [0, 2, 1, 3]}, shape=[batch, heads, rows, head_size])


def merge_heads(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The inverse of `split_heads`."""
    assert value.shape is not None
    batch, heads, rows, head_size = value.shape
    size = int(heads) * int(head_size)  # type: ignore[arg-type]
    together = append(
        graph, "Transpose", [value], {"perm": [0, 2, 1, 3]}, shape=[batch, rows, heads, head_size]
    )
    spec = initializer(graph, f"merged_{size}", np.array([0, 0, size], np.int64))
    return append(graph, "Reshape", [together, spec], shape=[batch, rows, size])


def split_last(graph: ir.Graph, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
    """Pieces of `sizes` along the last axis."""
    assert value.shape is not None
    lead = list(value.shape)[:-1]
    parts = initializer(graph, f"split_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
    node = ir.node("Split", [value, parts], {"axis": len(lead)}, num_outputs=len(sizes))
    graph.append(node)
    for output, size in zip(node.outputs, sizes, strict=True):
        output.shape, output.dtype = ir.Shape([*lead, size]), FLOAT
    return list(node.outputs)


def positions(graph: ir.Graph, like: ir.Value, axis: int) -> ir.Value:
    """0, 1, … as long as an axis of `like`, int64."""
    assert like.shape is not None
    size = like.shape[axis]
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    one = initializer(graph, "one_int64", np.array(1, np.int64))
    length = append(graph, "Shape", [like], {"start": axis, "end": axis + 1}, shape=[1], dtype=INT64)
    scalar = append(graph, "Squeeze", [length], shape=[], dtype=INT64)
    return append(graph, "Range", [zero, scalar, one], shape=[size], dtype=INT64)


def causal_mask(graph: ir.Graph, like: ir.Value, axis: int, window: int | None = None) -> ir.Value:
    """True where a query may attend to a key: not to one behind it, nor `window` or more before it.

    Args:
        like: the value whose `axis` is the sequence.
        window: how many keys a query sees at most, itself included; None: all before it.

    Returns:
        boolean `[sequence, sequence]`.
    """
    line = positions(graph, like, axis)
    assert line.shape is not None
    size = line.shape[0]
    last = initializer(graph, "mask_axis_last", np.array([1], np.int64))
    rows = append(graph, "Unsqueeze", [line, last], shape=[size, 1], dtype=INT64)
    mask = append(graph, "GreaterOrEqual", [rows, line], shape=[size, size], dtype=BOOL)
    if window is not None:
        width_value = initializer(graph, f"window_{window}", np.array(window, np.int64))
        distance = append(graph, "Sub", [rows, line], shape=[size, size], dtype=INT64)
        near = append(graph, "Less", [distance, width_value], shape=[size, size], dtype=BOOL)
        mask = append(graph, "And", [mask, near], shape=[size, size], dtype=BOOL)
    return mask


def key_mask(graph: ir.Graph, kept: ir.Value) -> ir.Value:
    """A boolean `[batch, keys]` as `[batch, 1, 1, keys]`."""
    assert kept.shape is not None
    batch, keys = kept.shape
    axes = initializer(graph, "mask_axes", np.array([1, 2], np.int64))
    return append(graph, "Unsqueeze", [kept, axes], shape=[batch, 1, 1, keys], dtype=BOOL)


def attend(
    graph: ir.Graph,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value | None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> ir.Value:
    """softmax(cap · tanh(scale · q kᵀ / cap) + mask) v, `[batch, heads, rows, head_size]`."""
    assert query.shape is not None
    assert value.shape is not None
    attributes = {"softcap": softcap} if softcap else {}
    if scale:
        attributes["scale"] = scale
    inputs = [query, key, value, *([] if mask is None else [mask])]
    shape = [*list(query.shape)[:3], value.shape[3]]
    return append(graph, "Attention", inputs, attributes, shape=shape)
