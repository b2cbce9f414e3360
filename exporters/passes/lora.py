"""Insert LoRA slots at linear layers.

    y = x Wᵀ + ((x A) * scaling) B        A [in, rank], scaling [rank], B [rank, out]

`A`, `B` and `scaling` are graph inputs with a rank axis of their own, so one graph serves any rank (0
switches the slot off exactly) and adapters mix by concatenation along the rank axis. `A` may have a leading
batch axis: every row of the batch then has an adapter of its own.

Source: LoRA, arXiv 2106.09685; keys as PEFT writes them.
"""

from collections.abc import Iterable

import onnx_ir as ir

from edgepeft.bundle.manifest import LoraSlot

from ..graph import append, graph_input
from .linears import Linear

PEFT_PREFIX = "base_model.model."


def insert_lora_slots(graph: ir.Graph, linears: Iterable[Linear]) -> list[LoraSlot]:
    """Give each of `linears` a slot; the caller sorts the graph afterwards."""
    slots = []
    for index, linear in enumerate(linears):
        key = f"{PEFT_PREFIX}{linear.module}"
        slot = LoraSlot(
            module=linear.module,
            in_features=linear.in_features,
            out_features=linear.out_features,
            a_input=f"{key}.lora_A.weight",
            b_input=f"{key}.lora_B.weight",
            scaling_input=f"{key}.scaling",
        )
        _insert(graph, linear, slot, f"rank_{index}")
        slots.append(slot)
    return slots


def _insert(graph: ir.Graph, linear: Linear, slot: LoraSlot, rank: str) -> None:
    lora_a = graph_input(graph, slot.a_input, [slot.in_features, rank])
    lora_b = graph_input(graph, slot.b_input, [rank, slot.out_features])
    scaling = graph_input(graph, slot.scaling_input, [rank])
    for node, x in linear.uses:
        output = node.outputs[0]
        assert output.shape is not None
        lead = list(output.shape)[:-1]
        readers = list(output.uses())
        low_rank = append(graph, "MatMul", [x, lora_a], shape=[*lead, rank])
        scaled = append(graph, "Mul", [low_rank, scaling], shape=[*lead, rank])
        delta = append(graph, "MatMul", [scaled, lora_b], shape=output.shape)
        total = append(graph, "Add", [output, delta], shape=output.shape)
        for reader, position in readers:
            reader.replace_input_with(position, total)
        if output.is_graph_output():
            graph.outputs[list(graph.outputs).index(output)] = total
            total.name, output.name = output.name, None
