"""Insert VeRA slots at linear layers.

    y += lambda_b * (((x Aᵀ) * lambda_d) Bᵀ)

Every slot has inputs of its own for the parts of `A` and `B` that it reads; on the device they are views of
one pair where the layer is as wide as the widest (`B`'s always).

Source: arXiv 2310.11454; keys as PEFT writes them.
"""

from collections.abc import Mapping

import onnx_ir as ir

from edgepeft.slots import Slot
from edgepeft.techniques import vera
from edgepeft.techniques.base import RANK, Settings

from ..graph import append
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import BaseGraph, BesideLinear, activation_axes, slot_rank, turned


class Vera(BesideLinear):
    """Its sites are linear modules."""

    name = vera.NAME

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names, each with the sizes of the pair for all of them."""
        found = super().sites(base, modules)
        linears = [linear for linear, _ in found]
        sizes = {
            vera.LARGEST_IN: max((linear.in_features for linear in linears), default=0),
            vera.LARGEST_OUT: max((linear.out_features for linear in linears), default=0),
            vera.MODULES: len(linears),
        }
        return [(linear, {**settings, **sizes}) for linear, settings in found]

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        rank = slot_rank(options)
        return {module: {RANK: rank} for module in super().fresh_modules(source, options)}

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return vera.new_slot(
            linear.module, linear.in_features, linear.out_features, settings, activation_axes(linear)
        )

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        _, out_features = vera.TECHNIQUE.features(slot)
        rank = int(slot.settings[RANK])
        assert x.shape is not None
        lead = list(x.shape)[:-1]
        a = turned(graph, inputs[vera.A])
        b = turned(graph, inputs[vera.B])
        low = append(graph, "MatMul", [x, a], shape=[*lead, rank])
        scaled = append(graph, "Mul", [low, inputs[vera.D]], shape=[*lead, rank])
        high = append(graph, "MatMul", [scaled, b], shape=[*lead, out_features])
        return append(graph, "Mul", [high, inputs[vera.B_SCALE]], shape=[*lead, out_features])


GRAPH_TECHNIQUE = Vera()
