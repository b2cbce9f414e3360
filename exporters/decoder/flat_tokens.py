"""Compute on tokens `[batch * sequence, width]` where rows and positions are not told apart.

`Gemm`, which adds while it multiplies, takes matrices only. Before: hidden states `[batch, sequence, width]`.
After: matrices wherever an operator treats every token alike, with a `Reshape` where another begins or ends.
"""

import numpy as np
import onnx_ir as ir

from ..graph import INT64, append, initializer

TOKENS = "tokens"
_ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Neg", "Exp", "Sqrt", "Pow", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "Cast",
}  # fmt: skip
_OF_ROWS = {
    "RMSNormalization",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "MatMul",
    "MatMulNBits",
    "MatMulBnb4",
    "Split",
}


def flatten_tokens(graph: ir.Graph) -> None:
    """Rewrite a sorted graph of `input_ids` `[batch, sequence]`; the caller sorts and tidies."""
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    lead = list(ids.shape)
    flat: set[ir.Value] = set()
    made: dict[ir.Value, ir.Value] = {}
    back: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        # In the order of the inputs, so that equal exports are equal files.
        inputs = dict.fromkeys(value for value in node.inputs if value is not None)
        apart = [value for value in inputs if is_hidden(value, lead)]
        together = [value for value in inputs if value in flat]
        if (apart or together) and treats_tokens_alike(node, {*apart, *together}):
            for value in apart:
                if value not in made:
                    assert value.shape is not None
                    width = value.shape[2]
                    assert isinstance(width, int)
                    target = initializer(graph, f"shape_tokens_{width}", np.array([-1, width], np.int64))
                    made[value] = append(
                        graph, "Reshape", [value, target], shape=[TOKENS, width], dtype=value.dtype
                    )
                _replace(node, value, made[value])
            for output in node.outputs:
                if output.shape is not None and output.uses():
                    output.shape = ir.Shape([TOKENS, output.shape[-1]])
                    flat.add(output)
            continue
        for value in together:
            if value not in back:
                back[value] = _apart(graph, value, ids)
            _replace(node, value, back[value])
    for index, output in enumerate(graph.outputs):
        if output in flat:
            graph.outputs[index] = _apart(graph, output, ids)
            graph.outputs[index].name, output.name = output.name, None


def is_hidden(value: ir.Value, lead: list[int | ir.SymbolicDim]) -> bool:
    """Whether a value is `[*lead, width]`, with `lead` the axes of the token ids."""
    shape = value.shape
    return shape is not None and len(shape) == 3 and list(shape)[:2] == lead and isinstance(shape[2], int)


def treats_tokens_alike(node: ir.Node, hidden: set[ir.Value]) -> bool:
    """Whether a node computes every token of `hidden` by itself, with the same weights."""
    others = [value for value in node.inputs if value is not None and value not in hidden]
    if node.op_type in _ELEMENTWISE and not node.domain:
        return all(_is_vector(value) for value in others)
    if node.op_type not in _OF_ROWS or node.inputs[0] not in hidden:
        return False
    if node.op_type == "MatMul":
        return _axes(others[0]) == 2 if others else False
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) in (-1, 2) and _set_axis(node)
    return node.op_type in ("MatMulNBits", "MatMulBnb4") or (
        node.attributes.get_int("axis", -1) in (-1, 2) and _set_axis(node)
    )


def _set_axis(node: ir.Node) -> bool:
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    return True


def _is_vector(value: ir.Value) -> bool:
    """Whether a value is a scalar, `[width]` or `[1, width]`."""
    return _axes(value) in (0, 1) or (value.shape is not None and list(value.shape)[:-1] == [1])


def _axes(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _replace(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for position, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(position, new)


def _apart(graph: ir.Graph, value: ir.Value, ids: ir.Value) -> ir.Value:
    """`[batch * sequence, width]` as `[batch, sequence, width]`."""
    assert value.shape is not None
    assert ids.shape is not None
    width = value.shape[1]
    assert isinstance(width, int)
    extent = append(graph, "Shape", [ids], shape=[2], dtype=INT64)
    last = initializer(graph, f"size_{width}", np.array([width], np.int64))
    target = append(graph, "Concat", [extent, last], {"axis": 0}, shape=[3], dtype=INT64)
    return append(graph, "Reshape", [value, target], shape=[*list(ids.shape), width], dtype=value.dtype)
