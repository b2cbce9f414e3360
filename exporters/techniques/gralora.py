"""Insert GraLoRA slots at linear layers.

    x in k blocks, h_n = x_n A_n;  y_j += (h_1j, …, h_kj) B_j · scaling

Source: arXiv 2505.20355; keys and sizes as PEFT has them.
"""

from collections.abc import Mapping

import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import Slot
from edgepeft.techniques import gralora
from edgepeft.techniques.base import RANK, SCALING, Settings

from ..graph import append
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import BaseGraph, BesideLinear, reshaped, slot_rank, turned


class GraLoRA(BesideLinear):
    """Its sites are linear modules."""

    name = gralora.NAME

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names."""
        found = super().sites(base, modules)
        for linear, settings in found:
            blocks = int(settings[gralora.BLOCKS])
            if linear.in_features % blocks or linear.out_features % blocks:
                raise ExportError(
                    f"linear {linear.module} is {linear.in_features} -> {linear.out_features} features, "
                    f"which are no multiples of gralora_k {blocks}: leave it out of the targets"
                )
        return found

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """With PEFT's default number of blocks.

        Raises:
            ExportError: the rank is no multiple of it.
        """
        rank, blocks = slot_rank(options), gralora.DEFAULT_BLOCKS
        if rank % blocks:
            raise ExportError(f"--rank {rank}: GraLoRA parts it in {blocks}, expected a multiple")
        settings: Settings = {RANK: rank, gralora.BLOCKS: blocks, gralora.HYBRID: 0}
        return dict.fromkeys(super().fresh_modules(source, options), settings)

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return gralora.new_slot(linear.module, linear.in_features, linear.out_features, settings)

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        rank, k = int(slot.settings[RANK]), int(slot.settings[gralora.BLOCKS])
        in_features, out_features = gralora.TECHNIQUE.features(slot)
        assert x.shape is not None
        lead = list(x.shape)[:-1]
        front, last, axes = lead[:-1], lead[-1], len(lead)
        kept, blocks_first = [0] * axes, [*range(axes - 1), axes, axes - 1, axes + 1]
        parted = reshaped(graph, x, [*kept, k, in_features // k], [*lead, k, in_features // k])
        apart = append(
            graph, "Transpose", [parted], {"perm": blocks_first}, shape=[*front, k, last, in_features // k]
        )
        low = append(graph, "MatMul", [apart, inputs[gralora.A]], shape=[*front, k, last, rank])
        ranks = reshaped(graph, low, [*kept, 0, k, rank // k], [*front, k, last, k, rank // k])
        # Of every block the ranks for another, side by side there.
        exchange = [*range(axes - 1), axes + 1, axes, axes - 1, axes + 2]
        given = append(graph, "Transpose", [ranks], {"perm": exchange}, shape=[*front, k, last, k, rank // k])
        beside = reshaped(graph, given, [*kept, 0, rank], [*front, k, last, rank])
        high = append(
            graph, "MatMul", [beside, inputs[gralora.B]], shape=[*front, k, last, out_features // k]
        )
        back = append(graph, "Transpose", [high], {"perm": blocks_first}, shape=[*lead, k, out_features // k])
        delta = reshaped(graph, back, [*kept, out_features], [*lead, out_features])
        if hybrid := int(slot.settings[gralora.HYBRID]):
            down, up = (turned(graph, inputs[name]) for name in (gralora.GENERAL_A, gralora.GENERAL_B))
            through = append(graph, "MatMul", [x, down], shape=[*lead, hybrid])
            whole = append(graph, "MatMul", [through, up], shape=[*lead, out_features])
            delta = append(graph, "Add", [delta, whole], shape=[*lead, out_features])
        return append(graph, "Mul", [delta, inputs[SCALING]], shape=[*lead, out_features])


GRAPH_TECHNIQUE = GraLoRA()
