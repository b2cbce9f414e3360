"""Lengths of the rows of a weight as it is stored, which are known once it is frozen."""

import onnx_ir as ir

from ..graph import graph_input

_MARK = "edgepeft.row_norms_of"


def row_norms(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """float32 `[rows]`; an input `NAME.row_norms` until the weight is frozen, then a constant."""
    assert weight.shape is not None
    name = f"{weight.name}.row_norms"
    there = next((value for value in graph.inputs if value.name == name), None)
    if there is not None:
        return there
    value = graph_input(graph, name, [weight.shape[0]])
    value.metadata_props[_MARK] = weight.name or ""
    return value


def find_row_norms(graph: ir.Graph) -> list[tuple[ir.Value, str]]:
    """Those inputs, each with the name of its weight."""
    return [(value, value.metadata_props[_MARK]) for value in graph.inputs if _MARK in value.metadata_props]
