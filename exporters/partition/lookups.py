"""Weights that a piece only looks rows up in, by an input of the model: embeddings."""

from __future__ import annotations

import onnx_ir as ir

from ..passes.weights.embedding import looked_up_by
from .signature import Signature

# The attribute that says along which axis rows are taken, by operator.
_AXES = {"Gather": "axis", "GatherBlockQuantized": "gather_axis"}
_INDICES = 1


def looked_up(signature: Signature) -> dict[str, str]:
    """For each weight input of the piece's graphs that is read by rows only, the model input that names the
    rows; an index of a row is one along the weight's first axis."""
    found: dict[str, str] = {}
    for place, weight in enumerate(signature.weights):
        readers = _readers(signature, weight)
        indices = {_indices(node) for node in readers}
        if len(indices) == 1 and (value := indices.pop()) is not None:
            assert value.name is not None
            found[f"weight.{place}"] = value.name
    return found


def _readers(signature: Signature, weight: ir.Value) -> list[ir.Node]:
    """The nodes that read a weight, or what is computed of it number by number."""
    found = []
    for node in signature.nodes:
        if weight in node.inputs:
            found += _readers(signature, node.outputs[0]) if node.op_type == "Cast" else [node]
    return found


def _indices(node: ir.Node) -> ir.Value | None:
    """The model input whose values are the rows that a node takes; None where it does something else."""
    axis = _AXES.get(node.op_type)
    if axis is None or node.attributes.get_int(axis, 0) != 0:
        return None
    indices = node.inputs[_INDICES]
    value = None if indices is None else looked_up_by(indices)
    return value if value is not None and value.is_graph_input() else None
