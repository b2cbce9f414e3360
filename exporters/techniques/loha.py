"""Insert LoHa slots at linear layers, as one low-rank product of rank r² (a Khatri-Rao product of factors).

    y += ((x (w1_b * w2_b)) · scaling) (w1_a * w2_a)

where `*` puts every rank of one factor beside every rank of the other: a weight of the layer's size is never
made. `w1_b * w2_b` is `[r², in_features]`, `w1_a * w2_a` `[out_features, r²]`.

Source: FedPara, arXiv 2108.06098, proposition 1; keys as PEFT writes them.
"""

from collections.abc import Mapping

import onnx_ir as ir

from edgepeft.slots import Slot
from edgepeft.techniques import loha
from edgepeft.techniques.base import RANK, SCALING, Settings

from ..graph import append
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import BesideLinear, reshaped, slot_rank, turned


class LoHa(BesideLinear):
    """Its sites are linear modules."""

    name = loha.NAME

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        rank = slot_rank(options)
        return {module: {RANK: rank} for module in super().fresh_modules(source, options)}

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return loha.new_slot(linear.module, linear.in_features, linear.out_features, int(settings[RANK]))

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        in_features, out_features = loha.TECHNIQUE.features(slot)
        rank = int(slot.settings[RANK])
        assert x.shape is not None
        lead, ranks = list(x.shape)[:-1], rank * rank
        down = _beside(graph, inputs["hada_w1_b"], inputs["hada_w2_b"], (rank, in_features), axis=0)
        up = _beside(graph, inputs["hada_w1_a"], inputs["hada_w2_a"], (out_features, rank), axis=1)
        low = append(graph, "MatMul", [x, turned(graph, down)], shape=[*lead, ranks])
        scaled = append(graph, "Mul", [low, inputs[SCALING]], shape=[*lead, ranks])
        return append(graph, "MatMul", [scaled, turned(graph, up)], shape=[*lead, out_features])


GRAPH_TECHNIQUE = LoHa()


def _beside(
    graph: ir.Graph, first: ir.Value, second: ir.Value, shape: tuple[int, int], *, axis: int
) -> ir.Value:
    """Every row (axis 0) or column (axis 1) of a matrix times every one of another of its shape."""
    rank, other = shape[axis], shape[1 - axis]
    outer = [rank, 1, other] if axis == 0 else [other, rank, 1]
    inner = [1, rank, other] if axis == 0 else [other, 1, rank]
    joined = [rank * rank, other] if axis == 0 else [other, rank * rank]
    whole = [rank, rank, other] if axis == 0 else [other, rank, rank]
    product = append(
        graph,
        "Mul",
        [reshaped(graph, first, outer, outer), reshaped(graph, second, inner, inner)],
        shape=whole,
    )
    return reshaped(graph, product, joined, joined)
