"""The embedding of tokens: where a graph looks up what `input_ids` name."""

import ast
from typing import NamedTuple

import onnx_ir as ir

from edgepeft.errors import ExportError

from ...graph import constant_value

_SCOPES = "pkg.torch.onnx.name_scopes"


class TokenEmbedding(NamedTuple):
    """The node that looks rows up, its table, what the module makes of them, `[batch, sequence, width]` (some
    scale them), and its width."""

    lookup: ir.Node
    table: ir.Value
    output: ir.Value
    width: int


def find_embedding(graph: ir.Graph, weights: dict[str, ir.Value]) -> TokenEmbedding:
    """The embedding of tokens.

    Raises:
        ExportError: the graph has none, or several.
    """
    tables = set(weights.values())
    found = [
        node
        for node in graph
        if node.op_type == "Gather" and node.inputs[0] in tables and _names_tokens(node.inputs[1])
    ]
    if len(found) != 1:
        raise ExportError(
            f"the graph looks {len(found) or 'nothing'} up by input_ids{' times' * (len(found) > 1)}, so it "
            "has no place for virtual tokens: train a LoRA instead"
        )
    (lookup,) = found
    table, output = lookup.inputs[0], lookup.outputs[0]
    assert table is not None
    module = scopes(lookup)[:-1]
    while len(readers := output.consumers()) == 1 and module and scopes(readers[0])[:-1] == module:
        output = readers[0].outputs[0]
    width = None if output.shape is None or len(output.shape) != 3 else output.shape[2]
    if not isinstance(width, int):
        raise ExportError("the shape of the graph's embeddings is unknown, so they take no virtual tokens")
    return TokenEmbedding(lookup, table, output, width)


def _names_tokens(indices: ir.Value | None) -> bool:
    """Whether these are the graph's `input_ids`, or those of them that are real tokens."""
    value = None if indices is None else looked_up_by(indices)
    return value is not None and value.is_graph_input() and value.name == "input_ids"


def looked_up_by(indices: ir.Value) -> ir.Value:
    """What names the rows that are looked up, the first of a table aside: it may stand for what is no row."""
    node = indices.producer()
    if node is None or node.op_type != "Where" or node.inputs[2] is None:
        return indices
    otherwise = constant_value(node.inputs[1])
    return node.inputs[2] if otherwise is not None and not otherwise.any() else indices


def scopes(node: ir.Node) -> list[str]:
    """Names of the modules that the node is in, and its own."""
    found = ast.literal_eval(node.metadata_props.get(_SCOPES) or "[]")
    return [str(name) for name in found]
