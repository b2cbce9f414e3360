"""Insert LoRA slots at linear layers.

    y = x Wᵀ + ((x A) * scaling) B        A [in, rank], scaling [rank], B [rank, out]

`A`, `B` and `scaling` are graph inputs with a rank axis of their own, so one graph serves any rank (0
switches the slot off exactly) and adapters mix by concatenation along the rank axis. `scaling` may have the
axes of x, `[batch, 1, …, rank]`: every row of the batch then has an adapter of its own.

Source: LoRA, arXiv 2106.09685; keys as PEFT writes them.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import LINEAR, LORA, Slot
from edgepeft.techniques import lora
from edgepeft.techniques.base import Settings

from ..graph import append, put_behind
from ..passes.weights.linears import Linear, select
from .base import BaseGraph, GraphTechnique, activation_axes, in_columns, slot_inputs


class Lora(GraphTechnique[Linear]):
    """Its sites are linear modules."""

    name, site = LORA, LINEAR

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Linear]:
        """The linears that these are the names of, or the ends of names."""
        return list(select(base.linears, modules).values())

    def insert(self, base: BaseGraph, sites: Sequence[Linear]) -> list[Slot]:
        slots = []
        for linear in sites:
            slot = lora.new_slot(
                linear.module, linear.in_features, linear.out_features, activation_axes(linear)
            )
            _insert(base.graph, linear, slot)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = Lora()


def _insert(graph: ir.Graph, linear: Linear, slot: Slot) -> None:
    lora_a, lora_b, scaling = slot_inputs(graph, slot)
    assert scaling.shape is not None
    (rank,) = scaling.shape
    for node, x in linear.uses:
        output = node.outputs[0]
        if output.shape is None:
            raise ExportError(
                f"linear {linear.module}: the shape of its output is unknown, so it takes no LoRA"
            )
        lead = list(output.shape)[:-1]
        low_rank = append(graph, "MatMul", [x, lora_a], shape=[*lead, rank])
        scaled = append(graph, "Mul", [low_rank, scaling], shape=[*lead, rank])
        delta = append(graph, "MatMul", [scaled, lora_b], shape=[*lead, linear.out_features])
        delta = in_columns(graph, delta, linear.first, output)
        put_behind(graph, output, "Add", delta)
