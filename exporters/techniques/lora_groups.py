"""Insert LoRA slots by results: slots whose results are read as one value share their two inputs.

    y = x Wᵀ + (x A) B        A [in, rank], B [rank, out]

The factors of the slots stand side by side along the rank axis; `B` is zero outside a slot's own ranks and
columns, and holds the scaling. Two small nodes a product are what a token can bear: a third that
multiplies by the scaling, 120 of them in 30 layers, takes 3% of a token's time, with an adapter or without.
"""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from edgepeft.bundle.wiring import GroupedSlot, LoraGroup

from ..graph import append, graph_input, put_behind, take_place
from ..passes.weights.linears import Linear, with_bias
from ..passes.weights.side_by_side import Place
from .base import size_axis


def insert_lora_groups(
    graph: ir.Graph, linears: Iterable[Linear], places: Mapping[ir.Node, Place]
) -> list[LoraGroup]:
    """Give the products of `linears` their slots; the caller sorts the graph afterwards.

    Args:
        linears: those that have slots.
        places: where the results of a linear's node are that was put beside others.
    """
    slots: dict[tuple[ir.Value, ir.Value], list[GroupedSlot]] = {}
    for linear in linears:
        for node, x in linear.uses:
            place = places.get(node) or Place(x, with_bias(node), 0)
            slot = GroupedSlot(linear.module, place.first + linear.first)
            slots.setdefault((place.x, place.output), []).append(slot)
    return [
        _insert(graph, x, output, found, index) for index, ((x, output), found) in enumerate(slots.items())
    ]


def _insert(
    graph: ir.Graph, x: ir.Value, output: ir.Value, slots: Sequence[GroupedSlot], index: int
) -> LoraGroup:
    assert x.shape is not None
    assert output.shape is not None
    lead = list(output.shape)[:-1]
    in_features, out_features = x.shape[-1], output.shape[-1]
    assert isinstance(in_features, int)
    assert isinstance(out_features, int)
    rank = size_axis(graph)
    group = LoraGroup(tuple(slots), in_features, out_features, f"lora.{index}.A", f"lora.{index}.B")
    lora_a = graph_input(graph, group.a_input, [in_features, rank])
    lora_b = graph_input(graph, group.b_input, [rank, out_features])
    low_rank = append(graph, "MatMul", [x, lora_a], shape=[*lead, rank])
    delta = append(graph, "MatMul", [low_rank, lora_b], shape=[*lead, out_features])
    put_behind(graph, output, "Add", delta)
    return group


def remove_lora_groups(graph: ir.Graph, groups: Iterable[LoraGroup]) -> None:
    """Take out of a graph what `insert_lora_groups` put in; the caller tidies."""
    factors = {name for group in groups for name in (group.a_input, group.b_input)}
    for value in [value for value in graph.inputs if value.name in factors]:
        for node, _ in list(value.uses()):
            for total, position in list(node.outputs[0].uses()):
                output = total.inputs[1 - position]
                if total.op_type == "Add" and output is not None:
                    take_place(output, total.outputs[0])
        graph.inputs.remove(value)
