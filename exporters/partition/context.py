"""The graph of what all stages share: masks, rotary angles, sizes; from the model inputs alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from ..graph import new_model, tidy
from .copying import Copier
from .cuts import ancestors


def build_context(
    graph: ir.Graph, names: Mapping[ir.Value, str], weight_names: Collection[str]
) -> tuple[ir.Model | None, dict[str, str]]:
    """The model that computes the values of `names` under their names, and its weights by input name.

    Values that are model inputs are left out; no model where nothing else is left.
    """
    computed = {value: name for value, name in names.items() if not value.is_graph_input()}
    if not computed:
        return None, {}
    needed = ancestors(computed)
    copier = Copier("context")
    weights: dict[str, str] = {}
    for node in graph:
        if node not in needed:
            continue
        for value in node.inputs:
            if value is None or value in copier.values:
                continue
            if value.is_graph_input():
                copier.add_input(value, value.name or "")
            elif value.name in weight_names:
                name = f"weight.{len(weights)}"
                weights[name] = value.name or ""
                copier.add_input(value, name)
        copier.copy(node)
    for value, name in computed.items():
        made = copier.values[value]
        made.name = name
        copier.graph.outputs.append(made)
    model = new_model(copier.graph)
    tidy(model)
    return model, weights
