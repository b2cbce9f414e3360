"""Leave to `Attention` what it does itself: grouped heads, and rows that are masked whole.

Exported models repeat keys and values for every head of a group (`Unsqueeze → Expand → Reshape`) and put
zeros where a query may attend to nothing (`Where`). The operator (ai.onnx, version 23) takes fewer key/value
heads than query heads, and onnxruntime's kernel gives zeros for a row whose every key is masked.
"""

import onnx_ir as ir

from ...graph import constant_value


def simplify_attention(graph: ir.Graph) -> int:
    """Rewrite every `Attention` of `graph`; the caller drops what is no longer read.

    Returns:
        How many inputs and guards were taken away.
    """
    rewritten = 0
    for node in graph:
        if node.op_type != "Attention" or node.domain:
            continue
        grouped = [ungrouped(node.inputs[position]) for position in (1, 2)]
        if all(value is not None for value in grouped):
            for position, value in zip((1, 2), grouped, strict=True):
                node.replace_input_with(position, value)
            rewritten += 2
        rewritten += _drop_guards(node.outputs[0])
    return rewritten


def ungrouped(value: ir.Value | None) -> ir.Value | None:
    """`[batch, kv_heads, sequence, head_dim]` behind a repetition of its heads, or None without one."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0] if reshape else None, "Expand")
    unsqueeze = producer(expand.inputs[0] if expand else None, "Unsqueeze")
    if reshape is None or expand is None or unsqueeze is None:
        return None
    source, axes = unsqueeze.inputs[0], constant_value(unsqueeze.inputs[1])
    repeated, result = expand.outputs[0].shape, reshape.outputs[0].shape
    if source is None or source.shape is None or repeated is None or result is None:
        return None
    if axes is None or axes.reshape(-1).tolist() != [2] or len(repeated) != 5 or len(result) != 4:
        return None
    heads, group = repeated[1], repeated[2]
    sizes_known = isinstance(heads, int) and isinstance(group, int)
    same = (
        sizes_known
        and source.shape[1] == heads
        and result[1] == heads * group
        and result[3] == source.shape[3]
    )
    return source if same else None


def _drop_guards(output: ir.Value) -> int:
    """Take away `Where(nothing attended, 0, output)`."""
    dropped = 0
    for node, position in list(output.uses()):
        if node.op_type != "Where" or position != 2 or len(output.uses()) != 1:
            continue
        zero = constant_value(node.inputs[1])
        if zero is not None and not zero.any() and producer(node.inputs[0], "Less") is not None:
            node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
            dropped += 1
    return dropped


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of this kind that makes a value, or None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None
